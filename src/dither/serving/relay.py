"""An engine's answer on its way to a client that may be slow, or gone.

The engine's bytes are read as fast as they come and kept until the client takes them, so that a slow
client holds none of the engine's slots longer than the answer takes to write; what is kept is bounded by
the length of an answer, and by MOST_KEPT.  A client that hangs up, or takes nothing for `STALLED` seconds,
ends the engine's work on its answer.

Events are passed on as they came, never parsed: only the start of each piece is looked at, since llama.cpp
reports what goes wrong in mid-stream in a form of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Send

from dither.engines.protocol import EngineGoneError, Reply
from dither.serving.errors import SERVER, ApiError, broken, from_engine, from_event

MOST_KEPT = 8 * 2**20  # bytes of one answer that wait for its client
MOST_DOCUMENT = 256 * 2**20  # bytes of a reply that is one document: embeddings of many texts
STALLED = 60.0  # seconds
_ERRORS = (b"error: ", b'data: {"error"')


class Kept:
    """The pieces of one stream between who reads them and who sends them."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._ended = False
        self._filled, self._drained = asyncio.Event(), asyncio.Event()

    async def fill(self, pieces: AsyncGenerator[bytes, None], finished: Callable[[], Awaitable[None]]) -> None:
        try:
            async with contextlib.aclosing(pieces) as found:
                async for piece in found:
                    if piece.startswith(_ERRORS):
                        piece = _event(from_event(json.loads(piece.partition(b": ")[2].split(b"\n", 1)[0])))
                    self._pieces.append(piece)
                    self._size += len(piece)
                    self._filled.set()
                    if self._size > MOST_KEPT:
                        self._drained.clear()
                        await self._drained.wait()
        except EngineGoneError as error:
            self._pieces.append(_event(broken(str(error))))
        finally:
            self._ended = True
            self._filled.set()
        await finished()

    async def take(self) -> bytes:
        """All there is, at least one piece; nothing at the end."""
        while not self._pieces and not self._ended:
            self._filled.clear()
            await self._filled.wait()
        found = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        self._drained.set()
        return found


def _event(error: ApiError) -> bytes:
    return b"data: " + error.encoded() + b"\n\n"


async def whole(reply: Reply) -> bytes:
    """A reply that is one document.  Raises ApiError where it is an error, or breaks off."""
    pieces, size = [], 0
    try:
        async with contextlib.aclosing(reply.pieces) as found:
            async for piece in found:
                pieces.append(piece)
                size += len(piece)
                if size > MOST_DOCUMENT:
                    raise ApiError(500, "the engine's reply is too large", SERVER, "engine")
    except EngineGoneError as error:
        raise broken(str(error)) from None
    body = b"".join(pieces)
    if reply.status != 200:
        raise _refusal(reply.status, body)
    return body


def _refusal(status: int, body: bytes) -> ApiError:
    try:
        found = json.loads(body)
        inner = found.get("error", found)
        return from_engine(status, inner if isinstance(inner, dict) else {"message": str(inner)})
    except (ValueError, AttributeError):
        return from_engine(status, {})


async def stream(reply: Reply, send: Send, finished: Callable[[], Awaitable[None]]) -> None:
    """Sends an event stream; `finished` is awaited once the engine is done, whatever the client does."""
    kept = Kept()
    filling = asyncio.ensure_future(kept.fill(reply.pieces, finished))
    try:
        piece = await kept.take()
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        while piece:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await kept.take()
        await send({"type": "http.response.body", "body": b""})
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)


_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx keeps the pieces until there are many
]


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Runs `work` to its end, or until the client hangs up.  Raises ClientDisconnect then.

    The request's body must have been read: what comes after it is the end."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        for part in (task, gone):
            part.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Watched:
    """`send` with a clock: how long the client has been taking nothing."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.since: float | None = None

    async def __call__(self, message: Message) -> None:
        self.since = asyncio.get_running_loop().time()
        await self._send(message)
        self.since = None

    def stalled(self) -> bool:
        return self.since is not None and asyncio.get_running_loop().time() - self.since > STALLED
