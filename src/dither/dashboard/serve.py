"""Binds a port and runs until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import uvicorn

from dither.dashboard.app import build
from dither.dashboard.forms import Forms
from dither.dashboard.jobs import Jobs
from dither.dashboard.results import Results
from dither.dashboard.security import Connection, Guard, bound_names
from dither.dashboard.watch import Watch
from dither.errors import UsageError
from dither.web.access import is_loopback
from dither.web.listening import in_url, listen, uvicorn_config

PORT = 8765
_TRIED = 20  # ports after the default one


def serve(
    runs: Iterable[str | Path],
    forms: Forms,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    against: str | None = None,
    state: Path | None = None,
    ready: Callable[[str], None] = lambda _url: None,
) -> int:
    """Serves until Ctrl-C.  `ready` hears the address once it answers.

    `forms` are what jobs may be started with.  Returns how many jobs go on after the end.

    `port` None takes the default one, or the next that is free; 0 takes any.  Raises UsageError where the
    address cannot be bound, OutputError where jobs cannot be kept.
    """
    bound = bind(host, port)
    number = bound.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    results, jobs = Results(runs, against), Jobs(forms, state)
    app = build(results, jobs, Watch(results.paths))
    everywhere = host in ("0.0.0.0", "::", "")
    guard = Guard(app, bound_names(host, number), number, token, addresses=everywhere)
    shown = socket.gethostname() if everywhere else in_url(host)  # a name that others can open
    url = f"http://{shown}:{number}/" + (f"?token={token}" if token else "")
    config = uvicorn_config(
        guard,
        log_level="error",  # requests that are no HTTP are answered, not logged: their bytes are a stranger's
        lifespan="on",
        timeout_graceful_shutdown=3,
        limit_concurrency=200,
        http=Connection,
    )
    server = _Server(config, app.state.hub.close, lambda: ready(url))
    with contextlib.closing(bound), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve(sockets=[bound]))
    return jobs.running()


class _Server(uvicorn.Server):
    """Tells when it answers, and ends those who listen to events before it waits for them."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], None], ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing, self._ready = closing, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.started:
            asyncio.get_event_loop().call_soon_threadsafe(self._closing)


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket.  Raises UsageError where there can be none."""
    wanted = range(PORT, PORT + _TRIED) if port is None else [port]
    for number in wanted:
        try:
            return listen(host, number)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and number != wanted[-1]:
                continue
            raise _no_port(host, number, error, port is None) from None
    raise AssertionError("a range of ports is never empty")


def _no_port(host: str, port: int, error: OSError, several: bool) -> UsageError:
    thing = f"port {port}" if port else f"address {host}"
    if error.errno == errno.EADDRINUSE:
        reason = f"and the {_TRIED - 1} before it are in use" if several else "is in use"
        return UsageError(thing, reason, "Choose another with --port, or --port 0 for any that is free.")
    if isinstance(error, socket.gaierror):
        return UsageError(f"host {host}", "is not an address of this machine", "Try --host 127.0.0.1.")
    return UsageError(thing, f"cannot be listened at ({error.strerror})", "Try another --host or --port.")
