"""A socket that listens, and uvicorn set up on it."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp


def listen(host: str, port: int, *, waiting: int = 128, unsent: int | None = None) -> socket.socket:
    """Listens at `host` (brackets around an IPv6 address are taken too).  Raises OSError where it cannot.

    `waiting` connections may wait to be accepted, `unsent` bytes the system may keep for a slow client.
    Processes that are started later do not inherit the socket (PEP 446), so a job never keeps the port.
    """
    where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    family, kind, protocol, _, address = where
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if unsent is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unsent)  # connections inherit it
        made.bind(address)
        made.listen(waiting)
    except OSError:
        made.close()
        raise
    return made


def in_url(host: str) -> str:
    """A host as an address bar wants it: IPv6 in brackets."""
    plain = host.strip("[]")
    return f"[{plain}]" if ":" in plain else plain


def uvicorn_config(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """No log of requests, no Server header, no web sockets, and no trust in what a proxy says."""
    return uvicorn.Config(app, access_log=False, server_header=False, proxy_headers=False, ws="none", **more)
