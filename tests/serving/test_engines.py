"""What the server asks an engine: what it takes is the engine's to say, whatever its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dither.engines.protocol import EMBEDDINGS, Reply
from dither.engines.settings import Settings, Wishes
from dither.serving import models, server
from dither.serving.access import Access
from dither.serving.app import App
from dither.serving.models import Catalog, ServedModel
from dither.serving.pool import Pool


class Vectors:
    """An engine that none of ours is: every text's vector is its length."""

    takes_tools, takes_schemas, takes_embeddings = False, False, True
    context, slots, alive = 100, 1, True
    started: list[Settings] = []  # noqa: RUF012

    @classmethod
    async def start(cls, path: str | Path, settings: Settings) -> Vectors:
        cls.started.append(settings)
        return cls()

    async def ask(self, path: str, body: Any) -> Reply:
        assert path == EMBEDDINGS
        data = [{"index": i, "embedding": [float(len(text))]} for i, text in enumerate(body["input"])]
        found = json.dumps({"data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            yield found

        return Reply(200, pieces())

    async def metrics(self) -> str:
        return ""

    async def close(self) -> None:
        pass


class Words(Vectors):
    """One that writes text alone."""

    takes_embeddings = False


async def posted(app: App, path: str, document: Any) -> tuple[int, Any]:
    body = json.dumps(document).encode()
    head = [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())]
    asked = asyncio.Queue[dict[str, Any]]()
    asked.put_nowait({"type": "http.request", "body": body, "more_body": False})
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    await app({"type": "http", "method": "POST", "path": path, "headers": head}, asked.get, send)
    return told[0]["status"], json.loads(told[1]["body"])


def embed(kind: type[Vectors], monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    monkeypatch.setitem(models.ENGINES, "another", kind)
    model = ServedModel("m", Path(), "another", 0, "", 100, 1, None, 0, Wishes())

    async def asked() -> tuple[int, Any]:
        pool = Pool([model], 10, 10, server.load)
        app = App(Access([], "127.0.0.1", False), Catalog([model]), pool, grammars=False)
        return await posted(app, "/v1/embeddings", {"input": ["abc"]})

    return asyncio.run(asked())


def test_an_engine_of_any_name_that_takes_embeddings_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = embed(Vectors, monkeypatch)
    assert status == 200 and found["data"][0]["embedding"] == [3.0]


def test_one_that_takes_none_is_not_even_started_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vectors, "started", [])
    status, found = embed(Words, monkeypatch)
    assert (status, found["error"]["code"], found["error"]["param"]) == (400, "unsupported_value", "model")
    assert Vectors.started == []
