"""Who may ask this server.

It listens on this machine, and every page in every tab of a browser can send requests to this machine.  So:

- **Host** must be a name this server was bound under.  A stranger's name that resolves to 127.0.0.1 (DNS
  rebinding) would otherwise make the stranger's script same-origin with us.
- **Origin** must be ours wherever one is sent, and must be sent with whatever changes anything: scripts of
  other pages cannot lie about it (Fetch standard, "Origin header").  Sec-Fetch-Site says the same of
  requests that send none.
- A **token** is asked for when the server is bound to more than this machine: in the address once, then as a
  cookie that scripts cannot read, or as a bearer.
- Bodies end at a limit, whether they announce their length or not.
- Every answer carries a content policy that lets the page load and talk to itself alone.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

MOST_BODY = 2**20  # bytes; the longest text of a forced comparison is far below
_READING = frozenset({"GET", "HEAD"})
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

# No 'unsafe-inline' and no 'unsafe-eval': Vega interprets its expressions (page/js/chart.js).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """
    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound_names(host: str, port: int) -> frozenset[str]:
    """The Host headers of a server bound to `host`, lower case, with its port."""
    names = {*_LOOPBACK, _bracketed(host)}
    if not is_loopback(host):
        names.add(socket.gethostname().lower())
    return frozenset(f"{name.lower()}:{port}" for name in names) | (
        frozenset(name.lower() for name in names) if port == 80 else frozenset()
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class RefusedError(Exception):
    def __init__(self, status: int, reason: str, way_out: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.way_out = status, reason, way_out


class Guard:
    """Wraps an application; requests that break a rule never reach it.

    `addresses`: also take numeric addresses as Host, for a server bound to all of a machine's.  They cannot
    be rebound: a name is what a stranger controls.
    """

    def __init__(
        self, app: App, names: Iterable[str], token: str | None = None, addresses: bool = False, port: int = 0
    ) -> None:
        self.app, self.names, self.token, self.addresses, self.port = (app, frozenset(names), token, addresses, port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here
        try:
            fresh = self._check(scope)
        except RefusedError as refused:
            await _refuse(refused, send)
            return
        try:
            body = await _whole(receive)
        except RefusedError as refused:
            await _refuse(refused, send)
            return
        answer = _Answer(send, self._cookie() if fresh else None)
        await self.app(scope, _Replayed(body, receive).receive, answer.send)

    def _check(self, scope: Scope) -> bool:
        """True where the token came in the address and should become a cookie.  Raises RefusedError."""
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value.decode("latin-1"))
        host = self._host(headers.get(b"host", []))
        self._origin(scope, headers, host)
        length = headers.get(b"content-length", ["0"])[0]
        if not length.isdigit() or int(length) > MOST_BODY:
            raise RefusedError(413, f"the request is larger than {MOST_BODY} bytes")
        return self._token(scope, headers)

    def _host(self, found: list[str]) -> str:
        host = found[0].lower() if len(found) == 1 else ""
        if host in self.names or (self.addresses and self._is_address(host)):
            return host
        raise RefusedError(421, "the request names another host", "Open the address that was printed at the start.")

    def _is_address(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return bool(colon) and port == str(self.port)

    def _origin(self, scope: Scope, headers: dict[bytes, list[str]], host: str) -> None:
        changes = scope["method"] not in _READING
        origins, sites = headers.get(b"origin", []), headers.get(b"sec-fetch-site", [])
        bearer = any(value.lower().startswith("bearer ") for value in headers.get(b"authorization", []))
        if origins and origins != [f"http://{host}"]:
            raise RefusedError(403, "the request comes from another page")
        if changes and not origins and not (self.token and bearer):
            raise RefusedError(403, "the request does not say which page it comes from", "Send an Origin header.")
        asks_data = scope["path"] != "/"
        if asks_data and sites and sites[0] not in ("same-origin", "none"):
            raise RefusedError(403, "the request comes from another page")
        if changes:
            kind = headers.get(b"content-type", [""])[0].partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RefusedError(415, "the request is no JSON")

    def _token(self, scope: Scope, headers: dict[bytes, list[str]]) -> bool:
        if self.token is None:
            return False
        for value in headers.get(b"authorization", []):
            scheme, _, given = value.partition(" ")
            if scheme.lower() == "bearer" and self._same(given.strip()):
                return False
        for value in headers.get(b"cookie", []):
            for part in value.split(";"):
                name, _, given = part.strip().partition("=")
                if name == self._cookie_name() and self._same(given):
                    return False
        if scope["method"] == "GET" and scope["path"] == "/":
            given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20).get("token", [""])[0]
            if self._same(given):
                return True
        raise RefusedError(401, "a token is needed", "Open the address with ?token=… that was printed at the start.")

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.token or "").encode())

    def _cookie_name(self) -> str:
        return f"dither-{self.port}"  # cookies are shared by all ports of a host

    def _cookie(self) -> bytes:
        return f"{self._cookie_name()}={self.token}; Path=/; HttpOnly; SameSite=Strict".encode()


async def _whole(receive: Receive) -> bytes:
    """A request's body, read here so that no more than the limit is ever held."""
    taken = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(taken)
        taken += message.get("body", b"")
        if len(taken) > MOST_BODY:
            raise RefusedError(413, f"the request is larger than {MOST_BODY} bytes")
        if not message.get("more_body"):
            return bytes(taken)


class _Replayed:
    """A body that was read, as the application expects to receive it; then whatever comes (a hang-up)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Answer:
    """Adds headers to an answer that goes out."""

    def __init__(self, send: Send, cookie: bytes | None) -> None:
        self._send, self._cookie = send, cookie

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [*HEADERS, *([(b"set-cookie", self._cookie)] if self._cookie else [])]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await self._send(message)


async def _refuse(refused: RefusedError, send: Send) -> None:
    said = {"error": {"thing": "the request", "reason": refused.reason, "way_out": refused.way_out}}
    body = json.dumps(said).encode()
    headers = [
        *HEADERS,
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
