"""Who may ask this server.

It listens on this machine, and every page in every tab of a browser can send requests to this machine
(`web/access.py`).  So:

- **Host** must be a name this server was bound under.
- **Origin** must be ours wherever one is sent, and must be sent with whatever changes anything.  Sec-Fetch-Site
  says the same of requests that send none.
- A **token** is asked for when the server is bound to more than this machine: in the address once, then as a
  cookie that scripts cannot read, or as a bearer.
- Bodies end at a limit and in time, and so do heads (`web/connection.py`).
- Every answer carries a content policy that lets the page load and talk to itself alone.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass

from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dither.web import connection
from dither.web.access import bearer, host_of, is_address, is_loopback, is_of_another_page, is_one_of
from dither.web.body import limited
from dither.web.headers import SECURITY, adding
from dither.web.listening import in_url

MOST_BODY = 2**20  # bytes; the longest text of a forced comparison is far below
BODY_SECONDS = 30.0  # for a body to arrive
_READING = frozenset({"GET", "HEAD"})
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def bound_names(host: str, port: int) -> frozenset[str]:
    """The Host headers of a server bound to `host`, lower case, with its port."""
    names = {*_LOOPBACK, in_url(host).lower()}
    if not is_loopback(host):
        names.add(socket.gethostname().lower())
    return frozenset(f"{name}:{port}" for name in names) | (names if port == 80 else frozenset())


class Connection(connection.Connection):
    refusal = json.dumps(
        {"error": {"thing": "the request", "reason": "is not a request in HTTP/1.1", "way_out": ""}}
    ).encode()


class RefusedError(HTTPException):
    def __init__(self, status: int, reason: str, way_out: str = "") -> None:
        super().__init__(status, reason, {"connection": "close"})
        self.way_out = way_out


@dataclass(frozen=True)
class Guard:
    """Wraps an application; requests that break a rule never reach it."""

    app: ASGIApp
    names: frozenset[str]
    port: int
    token: str | None = None
    addresses: bool = False  # numeric ones are taken as Host too: the server is bound to all of a machine's

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # no web sockets here
        headers, told = Headers(scope=scope), dict(SECURITY)
        try:
            self._check(scope, headers)
            receive = limited(scope, receive, MOST_BODY, BODY_SECONDS)
            name = f"dither-{self.port}"  # cookies are shared by all ports of a host
            given = (bearer(headers), cookie_parser(headers.get("cookie", "")).get(name, ""))
            if self.token is not None and not is_one_of(self.token, given):
                self._check_address(scope, self.token)
                told["set-cookie"] = f"{name}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        except HTTPException as refused:
            said = {"thing": "the request", "reason": refused.detail, "way_out": getattr(refused, "way_out", "")}
            app: ASGIApp = JSONResponse({"error": said}, refused.status_code, refused.headers)
        else:
            app = self.app
        await app(scope, receive, adding(send, told))

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = host_of(headers)
        name, _, port = host.rpartition(":")
        if host not in self.names and not (self.addresses and is_address(name) and port == str(self.port)):
            raise RefusedError(421, "the request names another host", "Open the address that was printed at the start.")
        changes, site = scope["method"] not in _READING, headers.get("sec-fetch-site", "none")
        if is_of_another_page(headers, host) or (scope["path"] != "/" and site not in ("same-origin", "none")):
            raise RefusedError(403, "the request comes from another page")
        if changes and "origin" not in headers and not (self.token and bearer(headers)):
            raise RefusedError(403, "the request does not say which page it comes from", "Send an Origin header.")
        if changes and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "the request is not JSON")

    def _check_address(self, scope: Scope, token: str) -> None:
        """The page itself may carry the token in its address, once: then it becomes a cookie."""
        given = QueryParams(scope["query_string"]).get("token", "") if scope["path"] == "/" else ""
        if scope["method"] != "GET" or not is_one_of(given, [token]):
            way_out = "Open the address with ?token=… that was printed at the start."
            raise RefusedError(401, "a token is needed", way_out)
