"""Who may ask: keys, and what a browser could be tricked into.

With a key, every path but /health wants it as `Authorization: Bearer KEY`.  Keys are compared in a time
that does not depend on where they differ.

Without one, a server on the loopback interface is still within reach of every page that a browser on this
machine has open.  A page may point its own domain at 127.0.0.1 (DNS rebinding) and would then read the
answers: so the Host must be an address, `localhost`, or the name under which containers know this machine;
none of these can be anybody's domain.  A page may also post blindly to 127.0.0.1: browsers say where such a
request comes from, and it is refused.  Beyond loopback a key is required, unless the person insists.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from dither.errors import SourceError, UsageError
from dither.serving.errors import INVALID, ApiError

# Docker and Podman give their host these names, inside containers, and bring their requests to loopback.
_LOCAL = ("localhost", "host.docker.internal", "gateway.docker.internal", "host.containers.internal")
_MOST_KEYS, _MOST_KEY_FILE = 1000, 2**16


class Access:
    def __init__(self, keys: Sequence[str], host: str, insecure: bool) -> None:
        """Raises UsageError where `host` is beyond loopback, there is no key and nobody insists."""
        if not all(keys):
            raise UsageError("an API key", "is empty, as is what clients without one send", "Give a real one.")
        self._keys = [key.encode() for key in keys]
        self._host = host
        self._checks_host = not keys and is_loopback(host)
        if not keys and not is_loopback(host) and not insecure:
            raise UsageError(
                f"--host {host}",
                "would let everybody on the network use the models without a key",
                "Give --api-key-file, or --insecure where the network itself keeps others out.",
            )

    @property
    def open_to_all(self) -> bool:
        return not self._keys and not is_loopback(self._host)

    def check(self, headers: Mapping[str, str], public: bool) -> None:
        """Raises ApiError where this request may not be answered."""
        if self._checks_host:
            self._check_host(headers)
        if self._keys and not public:
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, header: str) -> None:
        kind, _, given = header.partition(" ")
        offered = given.strip().encode() if kind.lower() == "bearer" else b""
        matches = [hmac.compare_digest(offered, key) for key in self._keys]
        if not any(matches):
            said = "The API key is not one of this server's." if offered else "This server wants an API key."
            raise ApiError(401, f"{said} Send it as Authorization: Bearer KEY.", INVALID, "invalid_api_key")

    def _check_host(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if not self._is_local(host):
            message = (
                f"the Host {host[:100]!r} is none that this server answers to: use 127.0.0.1 or localhost, "
                "or give it a key"
            )
            raise ApiError(403, message, INVALID, "host_not_allowed")
        origin = headers.get("origin")
        crosses = headers.get("sec-fetch-site") == "cross-site"
        if crosses or (origin is not None and origin.partition("://")[2] != host):
            raise ApiError(403, "pages of other sites may not use this server", INVALID, "origin_not_allowed")

    def _is_local(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower().rstrip(".")
        if name in (*_LOCAL, self._host.lower()) or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(path: str | Path) -> tuple[list[str], str | None]:
    """The keys of a file, one a line, and a warning where others may read it.

    Raises SourceError where it cannot be read, UsageError where it holds no key."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MOST_KEY_FILE + 1)
        lines = [line.strip() for line in raw.decode("ascii").splitlines()]
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", "Give a file with a key.") from None
    except UnicodeDecodeError:
        raise UsageError(str(path), "holds letters no key has", "Write one key a line, in ASCII.") from None
    if len(raw) > _MOST_KEY_FILE:  # cut off there, the last key would be the beginning of one
        reason = f"is longer than {_MOST_KEY_FILE} bytes"
        raise UsageError(str(path), reason, f"Write 1 to {_MOST_KEYS} keys, one a line.")
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or len(keys) > _MOST_KEYS:
        raise UsageError(str(path), f"holds {len(keys)} keys", f"Write 1 to {_MOST_KEYS}, one a line.")
    warning = None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warning = f"{path} can be read by other users of this machine: chmod 600 it"
    return keys, warning
