"""llama.cpp behind the server's `Engine`: a child process that runs it, spoken to over loopback.

The child is `engines/worker.py`.  Its llama.cpp listens on a free port of 127.0.0.1 and answers only to a
key drawn for this one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from dither.engines import http_client
from dither.engines.llamacpp import EngineError
from dither.engines.protocol import EngineGoneError, Reply
from dither.engines.settings import Settings
from dither.system import isolated

_DYING = 1.0  # seconds
_LAST_WORDS = 5.0  # seconds a child has to end by itself
_MOST_LINE = 2**20


class LlamaProcess:
    """An `Engine`.  Made by `start`."""

    takes_schemas: ClassVar = True
    takes_embeddings: ClassVar = True

    def __init__(self, process: asyncio.subprocess.Process, said: Mapping[str, Any], slots: int) -> None:
        self._process = process
        self.address, self.key = str(said["address"]), str(said["key"])
        self.context, self.slots = int(said["context"]), slots
        self.takes_tools = bool(said["takes_tools"])

    @classmethod
    async def start(cls, path: str | Path, settings: Settings) -> LlamaProcess:
        """Loads the file in a child.  Raises EngineError with llama.cpp's reason where it cannot."""
        process = await asyncio.create_subprocess_exec(
            *isolated.command("dither.engines.worker"),
            limit=_MOST_LINE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which lets answers finish
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps({"path": path, **asdict(settings)}, default=str).encode() + b"\n")
                await process.stdin.drain()
            line = await process.stdout.readline()
            if not line:
                code = await process.wait()
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                reason = f"llama.cpp's process ended while it loaded the file ({how})"
                way_out = "Too little memory is the usual cause: try a smaller -c, fewer --slots or --kv q8_0."
                raise EngineError(str(path), reason, way_out)
            said = json.loads(line)
            if "error" in said:
                raise EngineError(**said["error"])
        except BaseException:
            await asyncio.shield(_end(process))
            raise
        return cls(process, said, settings.slots or 1)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, path: str, body: Mapping[str, Any]) -> Reply:
        async with self._settled():
            reply = await http_client.request(self.address, self.key, path, json.dumps(body).encode())
        return replace(reply, pieces=self._watched(reply.pieces))

    async def _watched(self, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(pieces) as found, self._settled():
            async for piece in found:
                yield piece

    @contextlib.asynccontextmanager
    async def _settled(self) -> AsyncIterator[None]:
        """A process that died closes its connections a little before it counts as dead: whoever hears of
        the one shall find the other true."""
        try:
            yield
        except EngineGoneError:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), _DYING)
            raise

    async def metrics(self) -> str:
        reply = await http_client.request(self.address, self.key, "/metrics", None)
        return b"".join([piece async for piece in reply.pieces]).decode()

    async def close(self) -> None:
        await _end(self._process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Closing stdin asks it to; a child that does not listen is killed."""
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _LAST_WORDS)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
