"""The server as an ASGI application: which request goes where.

    POST /v1/chat/completions   POST /v1/completions   POST /v1/embeddings   POST /v1/api/embed (Ollama's)
    GET  /v1/models   GET /v1/models/NAME   GET /health   GET /metrics

Each path works without /v1 too, because clients differ in what they take for the base URL.

While it drains, what runs and what waits is finished, and everything new is told to go elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from operator import itemgetter
from struct import pack
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from dither.engines.protocol import CHAT, COMPLETIONS, EMBEDDINGS, Engine, EngineGoneError, Reply
from dither.serving import relay, requests
from dither.serving.access import Access
from dither.serving.errors import INVALID, RETRY, SERVER, ApiError, broken, draining, from_engine, unsupported
from dither.serving.fold import fold
from dither.serving.logprobs import as_completions
from dither.serving.metrics import CONTENT_TYPE, Metrics
from dither.serving.models import Catalog, ServedModel
from dither.serving.pool import Pool
from dither.serving.relay import Watched
from dither.web.body import TooLargeError, limited

BODY_LIMIT = 16 * 2**20  # bytes
BODY_SECONDS = 30.0  # for a body to arrive
MOST_CONNECTIONS = 1024
Check = Callable[[dict[str, Any]], dict[str, Any]]


class App:
    """`draining` refuses what is new."""

    def __init__(self, access: Access, catalog: Catalog, pool: Pool, grammars: bool) -> None:
        self.access, self.catalog, self.pool, self.grammars = access, catalog, pool, grammars
        self.metrics = Metrics()
        self.draining = False
        self.connections: Collection[Any] = ()  # those that are open, once a server has told
        self.active: dict[asyncio.Task[Any], Watched] = {}  # POST requests under way
        self._posts: dict[str, Callable[[ServedModel, dict[str, Any], _Exchange], Awaitable[None]]] = {
            "/chat/completions": partial(self._generate, CHAT, requests.chat),
            "/completions": partial(self._generate, COMPLETIONS, requests.completions),
            "/embeddings": self._embeddings,
            "/api/embed": self._ollama_embed,
        }
        self._gets = {"/models": self._models, "/health": self._health, "/metrics": self._metrics}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        asked = _Exchange(scope, receive, send)
        try:
            self.access.check(asked.headers, public=asked.path == "/health")
            if (count := len(self.connections)) > MOST_CONNECTIONS:
                message = f"{count} connections are open, which is more than this server takes; try again shortly"
                raise ApiError(503, message, SERVER, "too_many_connections", retry_after=RETRY)
            await self._route(asked)
        except ApiError as error:
            if not asked.status:  # no answer has begun
                await asked.answer(error.encoded(), status_code=error.status, headers=error.headers)
        except ClientDisconnect:
            self.metrics.gone += 1
        finally:
            known = asked.path if asked.path in self._posts or asked.path in self._gets else "other"
            if asked.status:
                self.metrics.requests[known, asked.model, asked.status] += 1

    async def _route(self, asked: _Exchange) -> None:
        if asked.path in self._posts:
            asked.check_method("POST")
            if self.draining:
                raise draining()
            await self._post(asked)
        elif asked.path.startswith("/models/"):
            asked.check_method("GET", "HEAD")
            await asked.answer(_described(self.catalog.find(unquote(asked.path.removeprefix("/models/")))))
        elif asked.path in self._gets:
            asked.check_method("GET", "HEAD")
            await self._gets[asked.path](asked)
        else:
            raise ApiError(404, f"there is no {asked.scope['path'][:200]!r} here", INVALID, "not_found")

    async def _post(self, asked: _Exchange) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.active[task] = asked.watched
        try:
            body = requests.parse(await asyncio.wait_for(asked.body(), BODY_SECONDS))
            model = self.catalog.find(body.get("model"))
            asked.model = model.name
            await relay.unless_gone(asked.receive, self._posts[asked.path](model, body, asked))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", INVALID, "timeout") from None
        finally:
            del self.active[task]

    def drop_stalled(self) -> None:
        """Ends the answers to clients that take nothing any more."""
        for task, watched in list(self.active.items()):
            if watched.stalled():
                task.cancel()

    async def _generate(
        self, path: str, check: Check, model: ServedModel, body: dict[str, Any], asked: _Exchange
    ) -> None:
        body = check(body)
        if "grammar" in body and not self.grammars:
            raise unsupported("grammar", "this server takes no grammars: serve with --grammars, or send a schema")
        started = time.monotonic()
        async with AsyncExitStack() as held:
            engine = await held.enter_async_context(self.pool.lease(model))
            _check_able(engine, model, body)
            if "max_tokens" in body:  # more than the context end where it does, with "length"
                body["max_tokens"] = min(body["max_tokens"], engine.context)
            try:
                # every answer is asked for as a stream: `fold.py` says why
                streamed = {} if body.get("stream") else {"stream": True, "stream_options": {"include_usage": True}}
                reply = await _asked(engine, path, body | {"model": model.name} | streamed)
                self.metrics.first_seconds += time.monotonic() - started
                self.metrics.first_count += 1
                if reply.status != 200:
                    await relay.whole(reply)  # raises what it says
                elif body.get("stream"):
                    await relay.stream(reply, asked.send, held.aclose)
                else:
                    async with aclosing(reply.pieces) as pieces:
                        document = await fold(pieces)
                    await asked.answer(document)
            except EngineGoneError as error:
                raise broken(str(error)) from None

    async def _embeddings(self, model: ServedModel, body: dict[str, Any], asked: _Exchange) -> None:
        wanted = requests.embeddings(body)
        found = await self._embedded(model, wanted["input"])
        if wanted["encoding_format"] == "base64":
            for item in found["data"]:
                vector = item["embedding"]
                item["embedding"] = base64.b64encode(pack(f"<{len(vector)}f", *vector)).decode()
        await asked.answer({**found, "object": "list", "model": model.name})

    async def _ollama_embed(self, model: ServedModel, body: dict[str, Any], asked: _Exchange) -> None:
        """https://github.com/ollama/ollama/blob/main/docs/api.md, "Generate Embeddings"; times in ns."""
        started = time.monotonic_ns()
        found = await self._embedded(model, requests.embeddings({"input": body.get("input")})["input"])
        made = {
            "model": model.name,
            "embeddings": [item["embedding"] for item in found["data"]],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": 0,
            "prompt_eval_count": found["usage"]["prompt_tokens"],
        }
        await asked.answer(made)

    async def _embedded(self, model: ServedModel, texts: list[Any]) -> dict[str, Any]:
        if not model.takes_embeddings:
            raise unsupported("model", f"{model.name} writes text; embeddings come from a GGUF")
        async with self.pool.lease(model, embeddings=True) as engine:
            try:
                reply = await engine.ask(EMBEDDINGS, {"input": texts})
            except EngineGoneError as error:
                raise broken(str(error)) from None
            found = json.loads(await relay.whole(reply))
        found["data"].sort(key=itemgetter("index"))
        return dict(found)

    async def _models(self, asked: _Exchange) -> None:
        await asked.answer({"object": "list", "data": [_described(model) for model in self.catalog.served]})

    async def _health(self, asked: _Exchange) -> None:
        if self.draining:
            raise draining()
        loaded = [held.model.name for held in self.pool.models if held.ready and not held.embeddings]
        loading = [held.model.name for held in self.pool.models if held.loading is not None]
        if loading and not loaded:  # at the start, after a crash, in exchange for another: requests wait for it
            message = f"{', '.join(loading)}: loading; requests that come now wait for it"
            raise ApiError(503, message, SERVER, "loading", retry_after=RETRY)
        await asked.answer({"status": "ok", "loaded": loaded})

    async def _metrics(self, asked: _Exchange) -> None:
        try:
            text = await self.metrics.text(self.pool)
        except EngineGoneError as error:
            raise from_engine(503, {"message": str(error)}) from None
        await asked.answer(text.encode(), kind=CONTENT_TYPE)


class _Exchange:
    """A request, and what was answered, for which model."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.watched = scope, receive, Watched(send)
        self.headers = Headers(scope=scope)
        path = scope["path"].rstrip("/")
        self.path = path[3:] if path.startswith("/v1/") else path
        self.status, self.model = 0, ""

    def check_method(self, *right: str) -> None:
        if self.scope["method"] not in right:
            raise ApiError(405, f"{self.path} takes {right[0]}", INVALID, "method_not_allowed")

    async def body(self) -> bytes:
        """Raises ApiError beyond the limit, ClientDisconnect where the client leaves."""
        try:
            return await Request(self.scope, limited(self.scope, self.receive, BODY_LIMIT)).body()
        except TooLargeError:
            message = f"the body is larger than {BODY_LIMIT // 2**20} MiB"
            raise ApiError(413, message, INVALID, "request_too_large") from None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.watched(message)

    async def answer(self, content: dict[str, Any] | bytes, *, kind: str = "application/json", **more: Any) -> None:
        """`more` is Response's: the status and headers."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        await Response(body, media_type=kind, **more)(self.scope, self.receive, self.send)


def _check_able(engine: Engine, model: ServedModel, body: dict[str, Any]) -> None:
    if body.get("tools") and body.get("tool_choice") != "none" and not engine.takes_tools:
        message = (
            f"the chat template of {model.name} has no place for tools: send the request without, or serve a model "
            "that was trained to call them"
        )
        raise unsupported("tools", message)
    schema = body.get("response_format", {}).get("type", "text") != "text" or "grammar" in body
    if schema and not engine.takes_schemas:
        raise unsupported("response_format", f"{model.name} runs in an engine that cannot force a form")


async def _asked(engine: Engine, path: str, body: dict[str, Any]) -> Reply:
    if path != COMPLETIONS or "logprobs" not in body:
        return await engine.ask(path, body)
    most = body["logprobs"]  # 0: the chosen token alone, which llama.cpp takes for none
    reply = await engine.ask(path, body | {"logprobs": max(1, most)})
    return reply if reply.status != 200 else replace(reply, pieces=as_completions(reply.pieces, most))


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dither",
        "context_length": model.context,
        "engine": model.engine,
    }
