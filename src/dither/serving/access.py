"""Who may ask: keys, and what a browser could be tricked into (`web/access.py`).

With a key, every path but /health wants it as `Authorization: Bearer KEY`.

Without one, a server on the loopback interface is still within reach of every page that a browser on this
machine has open.  So the Host must be an address, `localhost`, or the name under which containers know this
machine; none of these can be anybody's domain.  What a page of another site posts is refused.  Beyond loopback
a key is required, unless the person insists.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers

from dither.errors import SourceError, UsageError
from dither.serving.errors import INVALID, ApiError
from dither.web.access import bearer, host_of, is_address, is_loopback, is_of_another_page, is_one_of

# Docker and Podman give their host these names, inside containers, and bring their requests to loopback.
_LOCAL = ("localhost", "host.docker.internal", "gateway.docker.internal", "host.containers.internal")
_MOST_KEYS, _MOST_KEY_FILE = 1000, 2**16


class Access:
    def __init__(self, keys: Sequence[str], host: str, insecure: bool) -> None:
        """Raises UsageError where `host` is beyond loopback, there is no key and nobody insists."""
        if not all(keys):
            raise UsageError("an API key", "is empty, as is what clients without one send", "Give a real one.")
        self._keys, self._host = tuple(keys), host.strip("[]").lower()
        self._local = is_loopback(self._host)
        if self.open_to_all and not insecure:
            raise UsageError(
                f"--host {host}",
                "would let everybody on the network use the models without a key",
                "Give --api-key-file, or --insecure where the network itself keeps others out.",
            )

    @property
    def open_to_all(self) -> bool:
        return not self._keys and not self._local

    def check(self, headers: Headers, public: bool) -> None:
        """Raises ApiError where this request may not be answered."""
        if self._local and not self._keys:
            self._check_host(headers)
        given = bearer(headers)
        if self._keys and not public and not is_one_of(given, self._keys):
            said = "The API key is not one of this server's." if given else "This server wants an API key."
            raise ApiError(401, f"{said} Send it as Authorization: Bearer KEY.", INVALID, "invalid_api_key")

    def _check_host(self, headers: Headers) -> None:
        host = host_of(headers)
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").rstrip(".")
        if name not in (*_LOCAL, self._host) and not name.endswith(".localhost") and not is_address(name):
            message = (
                f"this server does not answer to the Host {host[:100]!r}: use 127.0.0.1 or localhost, or give it a key"
            )
            raise ApiError(403, message, INVALID, "host_not_allowed")
        crosses = headers.get("sec-fetch-site") == "cross-site"
        if crosses or is_of_another_page(headers, host, ("http", "https")):
            raise ApiError(403, "pages of other sites may not use this server", INVALID, "origin_not_allowed")


def read_keys(path: str | Path) -> tuple[list[str], str | None]:
    """The keys of a file, one a line, and a warning where others may read it.

    Raises SourceError where it cannot be read, UsageError where it holds no key."""
    path, way_out = Path(path), f"Write 1 to {_MOST_KEYS} keys, one a line, in ASCII."
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MOST_KEY_FILE + 1)
        lines = [line.strip() for line in raw.decode("ascii").splitlines()]
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", "Give a file with a key.") from None
    except UnicodeDecodeError:
        raise UsageError(str(path), "holds letters that no key has", way_out) from None
    if len(raw) > _MOST_KEY_FILE:  # cut off there, the last key would be the beginning of one
        raise UsageError(str(path), f"is longer than {_MOST_KEY_FILE} bytes", way_out)
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or len(keys) > _MOST_KEYS:
        raise UsageError(str(path), f"holds {len(keys)} keys", way_out)
    exposed = mode & (stat.S_IRGRP | stat.S_IROTH)
    return keys, f"{path} can be read by other users of this machine: chmod 600 it" if exposed else None
