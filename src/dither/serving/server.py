"""A server that listens: `dither.serve`, which is also what `dither serve` runs.

    with dither.serve(["model-Q4_K_M.gguf", "model-Q8_0.gguf"]) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")

The server lives in a thread with an event loop of its own; each GGUF runs in a child process.  `close`
drains: what runs and waits is finished, what is new is refused with 503, then the models are unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from dither.capacity.advice import usable
from dither.capacity.machine import detect
from dither.capacity.memory import KV_TYPES, margin
from dither.engines.llamacpp import EngineError
from dither.engines.protocol import Engine
from dither.engines.settings import Wishes, WishKeywords
from dither.errors import DitherError, UsageError
from dither.serving.access import Access
from dither.serving.app import App
from dither.serving.connection import Connection
from dither.serving.errors import ApiError
from dither.serving.models import ENGINES, Catalog, ServedModel, serve_files
from dither.serving.pool import Pool
from dither.units import format_bytes, parse_bytes
from dither.web.listening import in_url, listen, uvicorn_config

if TYPE_CHECKING:
    from typing_extensions import Unpack

QUEUE = 128  # requests that may wait
DRAIN = 600.0  # seconds that answers have to finish once the server is told to stop
_UNSENT = 2**18  # bytes the system may keep for a client that is slow
_JANITOR = 5.0  # seconds between looks for clients that take nothing


def serve(
    files: Sequence[str | Path] | str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_keys: Sequence[str] = (),
    insecure: bool = False,
    engine: str = "auto",
    memory: int | str | None = None,
    queue: int = QUEUE,
    grammars: bool = False,
    **wishes: Unpack[WishKeywords],
) -> Server:
    """Serves models over HTTP, in OpenAI's form, until the `Server` is closed.

    `files` are GGUFs or folders of checkpoints; a request's `model` picks one by name.  The first is loaded
    now, the others when they are asked for; `memory` (bytes or "16GiB", default: what is free) bounds what
    is loaded at once.  `port` 0 takes a free one, `queue` is how many requests may wait before others are
    refused.  Without `api_keys` everybody who reaches `host` may ask; beyond loopback that takes `insecure`.
    `wishes`: `context` in tokens per slot, `slots` (how many requests each model answers at once), `kv` (the
    cache's type), `loras` (adapters laid over every GGUF), `threads`, `gpu_layers` (-1: as many as fit).
    `grammars` lets requests bring grammars in llama.cpp's notation, with which a single one can keep a
    model busy for good: for people one trusts.

    Raises UsageError for options that make no sense, SourceError for a file that cannot be read,
    EngineError where the first model cannot be loaded or the port is taken.
    """
    named = [files] if isinstance(files, (str, Path)) else list(files)
    wished = replace(Wishes(gpu_layers=-1), **wishes)
    _check(wished, queue, port, engine)
    access = Access(api_keys, host, insecure)
    budget = _free(wished.gpu_layers) if memory is None else parse_bytes(memory, "--memory", 1)
    models = serve_files(named, wished, budget, engine)
    for model in models:
        if memory is not None and model.need > budget:
            raise UsageError(
                model.name,
                f"needs {format_bytes(model.need)} with {model.slots} × {model.context} tokens, more than "
                f"--memory {format_bytes(budget)}",
                "Take a smaller file, a shorter -c, fewer --slots, or --kv q8_0.",
            )
    return Server(App(access, Catalog(models), Pool(models, budget, queue, load), grammars), host, port)


def _check(wished: Wishes, queue: int, port: int, engine: str) -> None:
    for option, value, least, most, way_out in (
        ("--context", wished.context, 1, 2**28, "Give a number of tokens: 8192, say."),
        ("--slots", wished.slots, 1, 1024, "Give a number of conversations: 4, say."),
        ("--queue", queue, 0, 100_000, "Give a number of requests: 128, say."),
        ("--port", port, 0, 2**16 - 1, "0 takes a free one."),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"{option} {value}", f"is not a whole number from {least} to {most}", way_out)
    for option, name, known in (("--kv", wished.kv, KV_TYPES), ("--engine", engine, ("auto", *ENGINES))):
        if name not in known:
            raise UsageError(f"{option} {name}", "is not known", f"Choose one of {', '.join(known)}.")


def _free(gpu_layers: int) -> int:
    """Bytes that models may take together where nobody said so."""
    machine = detect(bandwidth=False)
    cards = 0 if machine.unified or not gpu_layers else sum(g.bytes - margin(g.bytes) for g in machine.gpus)
    return usable(machine) + cards


async def load(model: ServedModel, embeddings: bool) -> Engine:
    return await ENGINES[model.engine].start(model.path, model.settings(embeddings))


class Server:
    """A running server.  A context manager; `close` drains it and gives the memory back.

    `url` is the base URL that OpenAI's clients want, `models` what is served.
    """

    def __init__(self, app: App, host: str, port: int) -> None:
        self.app, self.access, self.models, self.budget = app, app.access, app.catalog.served, app.pool.budget
        try:
            self._socket = listen(host, port, waiting=1024, unsent=_UNSENT)
        except OSError as error:
            reason = f"cannot be listened on ({error.strerror})"
            raise EngineError(f"{host}:{port}", reason, "Choose another --port, or 0.") from None
        self.url = f"http://{in_url(host)}:{self._socket.getsockname()[1]}/v1"
        self._began: Future[None] = Future()
        self._stop = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._patience = DRAIN
        self._thread = threading.Thread(target=self._run, name="dither-serve", daemon=True)
        self._thread.start()
        failed = self._began.exception()
        if failed is not None:
            self.close()
            raise failed

    def drain(self, patience: float = DRAIN) -> None:
        """Refuses what is new from now on, and ends when the rest is done, or after `patience` seconds."""
        self._patience = patience
        if self.loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended this moment
                self.loop.call_soon_threadsafe(self._stop.set)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the server has ended, after at most so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self, patience: float = 30.0) -> None:
        """Drains, and waits for the end.  May be called twice."""
        self.drain(patience)
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self._began.done():  # whoever waits for the start gets it
                self._began.set_exception(error)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        try:
            await _try_first(self.app.pool, self.models[0])
            config = uvicorn_config(
                self.app,
                log_config=None,
                log_level="error",
                lifespan="off",
                date_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
                http=Connection,
            )
            server = uvicorn.Server(config)
            self.app.connections = server.server_state.connections
            serving = asyncio.ensure_future(server.serve(sockets=[self._socket]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            self._began.set_result(None)
            await self._until_drained(serving)
            server.should_exit = True
            await serving
        finally:
            await self.app.pool.close()

    async def _until_drained(self, serving: asyncio.Future[Any]) -> None:
        while not self._stop.is_set() and not serving.done():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _JANITOR)
            self.app.drop_stalled()
        self.app.draining = True
        began = time.monotonic()
        while self.app.active and time.monotonic() - began < self._patience:
            await asyncio.sleep(0.02)
            self.app.drop_stalled()


async def _try_first(pool: Pool, model: ServedModel) -> None:
    """So that a file that does not load says so now, not to the first client."""
    try:
        async with pool.lease(model):
            pass
    except ApiError as error:
        if isinstance(error.__cause__, DitherError):
            raise error.__cause__ from None
        raise EngineError(model.name, error.message, "") from None
