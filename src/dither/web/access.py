"""Whose request is it?  A browser on this machine sends requests for every page that it has open.

- A page may point its own domain at 127.0.0.1 (DNS rebinding): its script is then same-origin with us, and only
  the **Host** header tells.  Numeric addresses cannot be rebound: a name is what a stranger controls.
- A page may post here without reading the answer: **Origin** says which page that is, and scripts cannot lie
  about it (Fetch standard, "Origin header").
- **Keys** are compared in a time that does not depend on where they differ.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host`, a name or an address without brackets, is reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(name: str) -> bool:
    """Whether this is a number; an IPv6 address stands in brackets or without."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def host_of(headers: Headers) -> str:
    """The Host a request names, in lower case; "" where it names none or several."""
    found = headers.getlist("host")
    return found[0].lower() if len(found) == 1 else ""


def is_of_another_page(headers: Headers, host: str, schemes: Iterable[str] = ("http",)) -> bool:
    """Whether the Origin of a request, if it states one, is another than `host`."""
    origins = headers.getlist("origin")
    return bool(origins) and origins not in [[f"{scheme}://{host}"] for scheme in schemes]


def bearer(headers: Headers) -> str:
    """The key of `Authorization: Bearer KEY`; "" where there is none."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if kind.lower() == "bearer" else ""


def is_one_of(given: str, keys: Iterable[str]) -> bool:
    same = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]  # all of them, whichever it is
    return any(same)
