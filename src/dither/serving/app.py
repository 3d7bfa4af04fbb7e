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
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from struct import pack
from typing import Any
from urllib.parse import unquote

from dither.engines.protocol import CHAT, COMPLETIONS, EMBEDDINGS, Engine, EngineGoneError, Reply
from dither.serving import relay, requests
from dither.serving.access import Access
from dither.serving.errors import INVALID, ApiError, broken, crowded, draining, from_engine, unsupported
from dither.serving.fold import fold
from dither.serving.logprobs import as_completions
from dither.serving.messages import no_place_for_tools
from dither.serving.metrics import CONTENT_TYPE, Metrics
from dither.serving.models import Catalog, Served
from dither.serving.pool import Pool
from dither.serving.relay import ClientGoneError, Message, Receive, Send, Watched

BODY_LIMIT = 16 * 2**20  # bytes
BODY_SECONDS = 30.0  # for a body to arrive
MOST_CONNECTIONS = 1024
Scope = Mapping[str, Any]


class App:
    """`access`, `catalog` and `pool` are what it works with; `draining` refuses what is new."""

    def __init__(self, access: Access, catalog: Catalog, pool: Pool, grammars: bool) -> None:
        self.grammars = grammars
        self.access, self.catalog, self.pool = access, catalog, pool
        self.metrics = Metrics()
        self.draining = False
        self.connections: Collection[Any] = ()  # those that are open, once a server has told
        self.active: dict[asyncio.Task[Any], Watched] = {}  # POST requests under way
        self._posts: dict[str, Callable[[Served, Mapping[str, Any], _Counted], Awaitable[None]]] = {
            "/chat/completions": self._chat,
            "/completions": self._completions,
            "/embeddings": self._embeddings,
            "/api/embed": self._ollama_embed,
        }
        self._gets = {"/models": self._models, "/health": self._health, "/metrics": self._metrics}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        counted = _Counted(send)
        path = scope["path"].rstrip("/")
        path = path[3:] if path.startswith("/v1/") else path
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self.access.check(headers, public=path == "/health")
            if len(self.connections) > MOST_CONNECTIONS:
                raise crowded(len(self.connections))
            await self._route(scope, path, headers, receive, counted)
        except ApiError as error:
            await _refuse(counted, error)
        except ClientGoneError:
            self.metrics.gone += 1
            return
        finally:
            known = path if path in self._posts or path in self._gets else "other"
            if counted.status:
                self.metrics.requests[known, counted.model, counted.status] += 1

    async def _route(
        self, scope: Scope, path: str, headers: Mapping[str, str], receive: Receive, send: _Counted
    ) -> None:
        method = scope["method"]
        if path in self._posts:
            if method != "POST":
                raise _wrong_method(path, "POST")
            if self.draining:
                raise draining()
            await self._post(path, headers, receive, send)
            return
        single = path.startswith("/models/")
        if path not in self._gets and not single:
            raise ApiError(404, f"there is no {scope['path'][:200]!r} here", INVALID, "not_found")
        if method not in ("GET", "HEAD"):
            raise _wrong_method(path, "GET")
        if single:
            model = self.catalog.find(unquote(path.removeprefix("/models/")))
            await _send_json(send, _described(model))
        else:
            await self._gets[path](send)

    async def _post(self, path: str, headers: Mapping[str, str], receive: Receive, send: _Counted) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.active[task] = send.watched
        try:
            raw = await asyncio.wait_for(_read(receive, headers), BODY_SECONDS)
            body = requests.parse(raw)
            model = self.catalog.find(body.get("model"))
            send.model = model.name
            await relay.unless_gone(receive, self._posts[path](model, body, send))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", INVALID, "timeout") from None
        finally:
            del self.active[task]

    def drop_stalled(self) -> None:
        """Ends the answers to clients that take nothing any more."""
        for task, watched in list(self.active.items()):
            if watched.stalled():
                task.cancel()

    async def _chat(self, model: Served, body: Mapping[str, Any], send: _Counted) -> None:
        await self._generate(model, CHAT, requests.chat(body), send)

    async def _completions(self, model: Served, body: Mapping[str, Any], send: _Counted) -> None:
        await self._generate(model, COMPLETIONS, requests.completions(body), send)

    async def _generate(self, model: Served, path: str, body: dict[str, Any], send: _Counted) -> None:
        if "grammar" in body and not self.grammars:
            raise unsupported("grammar", "this server takes no grammars: serve with --grammars, or send a schema")
        started = time.monotonic()
        async with AsyncExitStack() as held:
            engine = await held.enter_async_context(self.pool.lease(model))
            _check_able(engine, model, body)
            requests.clamp(body, engine.context)
            try:
                reply = await _asked(engine, path, body | {"model": model.name} | _streamed(body))
                self.metrics.first_byte(time.monotonic() - started)
                if reply.status != 200:
                    await relay.whole(reply)  # raises what it says
                elif body.get("stream"):
                    await relay.stream(reply, send, held.aclose)
                else:
                    async with relay.pieces_of(reply) as pieces:
                        document = await fold(pieces)
                    await _send(send, 200, "application/json", document)
            except EngineGoneError as error:
                raise broken(str(error)) from None

    async def _embeddings(self, model: Served, body: Mapping[str, Any], send: _Counted) -> None:
        asked = requests.embeddings(body)
        found = await self._embedded(model, asked["input"])
        if asked["encoding_format"] == "base64":
            for item in found["data"]:
                vector = item["embedding"]
                item["embedding"] = base64.b64encode(pack(f"<{len(vector)}f", *vector)).decode()
        await _send_json(send, {**found, "object": "list", "model": model.name})

    async def _ollama_embed(self, model: Served, body: Mapping[str, Any], send: _Counted) -> None:
        """https://github.com/ollama/ollama/blob/main/docs/api.md, "Generate Embeddings"; times in ns."""
        started = time.monotonic_ns()
        asked = requests.embeddings({"input": body.get("input")})
        found = await self._embedded(model, asked["input"])
        made = {
            "model": model.name,
            "embeddings": [item["embedding"] for item in found["data"]],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": 0,
            "prompt_eval_count": found["usage"]["prompt_tokens"],
        }
        await _send_json(send, made)

    async def _embedded(self, model: Served, texts: list[Any]) -> dict[str, Any]:
        if model.engine != "llamacpp":
            raise unsupported("model", f"{model.name} writes text; embeddings come from a GGUF")
        async with self.pool.lease(model, embeddings=True) as engine:
            try:
                reply = await engine.ask(EMBEDDINGS, {"input": texts})
            except EngineGoneError as error:
                raise broken(str(error)) from None
            found = json.loads(await relay.whole(reply))
        found["data"].sort(key=lambda item: item["index"])
        return dict(found)

    async def _models(self, send: _Counted) -> None:
        listed = [_described(model) for model in self.catalog.served]
        await _send_json(send, {"object": "list", "data": listed})

    async def _health(self, send: _Counted) -> None:
        if self.draining:
            raise draining()
        loaded = [place.model.name for place in self.pool.places if place.ready and not place.embeddings]
        await _send_json(send, {"status": "ok", "loaded": loaded})

    async def _metrics(self, send: _Counted) -> None:
        try:
            text = await self.metrics.text(self.pool)
        except EngineGoneError as error:
            raise from_engine(503, {"message": str(error)}) from None
        await _send(send, 200, CONTENT_TYPE, text.encode())


class _Counted:
    """`send` that remembers what was answered, for whom."""

    def __init__(self, send: Send) -> None:
        self.watched = Watched(send)
        self.status, self.model = 0, ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.watched(message)


def _check_able(engine: Engine, model: Served, body: dict[str, Any]) -> None:
    if body.get("tools") and body.get("tool_choice") != "none" and not engine.takes_tools:
        raise no_place_for_tools(model.name)
    schema = body.get("response_format", {}).get("type", "text") != "text" or "grammar" in body
    if schema and not engine.takes_schemas:
        raise unsupported("response_format", f"{model.name} runs in an engine that cannot force a form")


async def _asked(engine: Engine, path: str, body: dict[str, Any]) -> Reply:
    if path != COMPLETIONS or "logprobs" not in body:
        return await engine.ask(path, body)
    most = body["logprobs"]  # 0: the chosen token alone, which llama.cpp takes for none
    reply = await engine.ask(path, body | {"logprobs": max(1, most)})
    if reply.status != 200:
        return reply
    assert isinstance(reply.pieces, AsyncGenerator)
    return replace(reply, pieces=as_completions(reply.pieces, most))


def _streamed(body: dict[str, Any]) -> dict[str, Any]:
    """Every answer is asked for as a stream: `fold.py` says why."""
    return {} if body.get("stream") else {"stream": True, "stream_options": {"include_usage": True}}


def _described(model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dither",
        "context_length": model.context,
        "engine": model.engine,
    }


def _wrong_method(path: str, right: str) -> ApiError:
    return ApiError(405, f"{path} takes {right}", INVALID, "method_not_allowed")


async def _read(receive: Receive, headers: Mapping[str, str]) -> bytes:
    """The whole body.  Raises ApiError beyond the limit, ClientGoneError where the client leaves."""
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > BODY_LIMIT:
        raise _too_large()
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > BODY_LIMIT:
            raise _too_large()
        if not message.get("more_body"):
            return b"".join(pieces)


def _too_large() -> ApiError:
    message = f"the body is larger than {BODY_LIMIT // 2**20} MiB"
    return ApiError(413, message, INVALID, "request_too_large")


async def _send_json(send: _Counted, document: dict[str, Any]) -> None:
    await _send(send, 200, "application/json", json.dumps(document).encode())


async def _send(
    send: _Counted, status: int, kind: str, body: bytes, more: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: _Counted, error: ApiError) -> None:
    """A refusal ends the connection where the body may not have been read."""
    if send.status:  # the answer had begun
        return
    more: list[tuple[bytes, bytes]] = []
    if error.retry_after is not None:
        more.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        more.append((b"www-authenticate", b"Bearer"))
    if error.status in (408, 413, 503):
        more.append((b"connection", b"close"))
    await _send(send, error.status, "application/json", error.encoded(), tuple(more))
