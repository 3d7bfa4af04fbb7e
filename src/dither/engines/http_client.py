"""Just enough HTTP/1.1 to speak to a server of our own on the loopback interface.

One connection per request, as closing it is how an answer is stopped.  The body is handed on in the pieces
in which it comes from the network: per token that is one wake-up and a few slices, where a general client
costs several times as much, and a fast model writes a token every half millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from dither.engines.protocol import EngineGoneError, Reply

GATHER = 0.003  # seconds; slower streams than 300 tokens a second are passed on token by token
_PIECE = 65536


async def request(address: str, key: str, path: str, body: bytes | None) -> Reply:
    """POSTs `body`, or GETs where there is none.  Raises EngineGoneError where nobody answers."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=4 * _PIECE)
    except OSError as error:
        raise EngineGoneError(str(error)) from None
    try:
        writer.write(_head(address, key, path, body) + (body or b""))
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(first.split(" ", 2)[1])
    except BaseException as error:
        writer.close()
        if isinstance(error, (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError)):
            raise EngineGoneError(str(error)) from None
        raise
    named = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in named}
    return Reply(status, _read_body(reader, writer, headers))


def _head(address: str, key: str, path: str, body: bytes | None) -> bytes:
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        f"Host: {address}",
        f"Authorization: Bearer {key}",
        "Connection: close",
    ]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


async def _read_body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]
) -> AsyncGenerator[bytes, None]:
    """Ends early, with EngineGoneError, where the connection does."""
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            async for piece in _chunks(reader, writer.transport):
                yield piece
        else:
            left = int(headers.get("content-length", 0))
            while left:
                piece = await reader.read(min(left, _PIECE))
                if not piece:
                    raise EngineGoneError("the connection closed in the middle of an answer")
                left -= len(piece)
                yield piece
    except (OSError, ValueError) as error:
        raise EngineGoneError(str(error)) from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await asyncio.shield(writer.wait_closed())


async def _chunks(reader: asyncio.StreamReader, transport: asyncio.BaseTransport) -> AsyncGenerator[bytes, None]:
    """Chunked transfer coding (RFC 9112, section 7.1); what arrived together is yielded together.

    A stream that is fast is left in the system's buffer for a moment, as waking up for each token would cost
    an engine on the same cores more than the moment does."""
    assert isinstance(transport, asyncio.ReadTransport)
    buffer, last, clock = b"", 0.0, asyncio.get_running_loop().time
    while True:
        whole, at, ended = [], 0, False
        while (end := buffer.find(b"\r\n", at)) >= 0:
            size = int(buffer[at:end].split(b";")[0], 16)
            ended = size == 0
            if ended or len(buffer) < end + 2 + size + 2:
                break
            whole.append(buffer[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
        buffer = buffer[at:]
        if whole:
            yield b"".join(whole)
        if ended:
            return
        if whole and clock() - last < GATHER:
            transport.pause_reading()
            await asyncio.sleep(GATHER)
            transport.resume_reading()
        last = clock()
        piece = await reader.read(_PIECE)
        if not piece:
            raise EngineGoneError("the connection closed in the middle of an answer")
        buffer += piece
