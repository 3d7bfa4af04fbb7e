"""Requests that two programs may read in two ways, byte by byte, for both servers (RFC 9112, sections 2.2, 5, 6, 11.2).

Each hides a second request behind the first.  A server that answers more than once, or anything but 400, has read what
a proxy before it may have taken for something else.
"""

from __future__ import annotations

import contextlib
import socket

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_TWO = b"\r\nContent-Length: %d\r\n" % len(HIDDEN)
_CHUNKED = b"0\r\n\r\n" + HIDDEN


def smuggled(host: str, path: str) -> dict[str, bytes]:
    """Name of the attack → what is sent, ended by a second request."""
    plain = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Type: application/json\r\n".encode()
    )
    length = b"Content-Length: %d\r\n" % len(_CHUNKED)
    return {
        "a length beside a coding": plain + length + b"Transfer-Encoding: chunked\r\n\r\n" + _CHUNKED,
        "a coding beside a length": plain + b"Transfer-Encoding: chunked\r\n" + length + b"\r\n" + _CHUNKED,
        "two lengths": plain + b"Content-Length: 0" + _TWO + b"\r\n" + HIDDEN,
        "a list of lengths": plain + b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        "a signed length": plain + b"Content-Length: +0\r\n\r\n" + HIDDEN,
        "a length in hexadecimal": plain + b"Content-Length: 0x0\r\n\r\n" + HIDDEN,
        "a length below nothing": plain + b"Content-Length: -1\r\n\r\n" + HIDDEN,
        "two codings": plain + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + _CHUNKED,
        "a coding that is unknown": plain + b"Transfer-Encoding: xchunked\r\n\r\n" + _CHUNKED,
        "a space before the colon": plain + b"Transfer-Encoding : chunked\r\n\r\n" + _CHUNKED,
        "a folded line": plain + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + _CHUNKED,
        "a bare line feed after a name": plain + b"X: a\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKED,
        "a head that ends with bare line feeds": plain.replace(b"\r\n", b"\n") + b"\n" + HIDDEN,
        "a bare carriage return": plain + b"X: a\rTransfer-Encoding: chunked\r\n\r\n" + _CHUNKED,
        "a NUL in a value": plain + b"X: a\0b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        "a size of a chunk below nothing": plain + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + _CHUNKED,
        "a chunk without its end": plain + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{XX0\r\n\r\n" + HIDDEN,
        "two hosts": plain.replace(b"\r\nOrigin", b"\r\nHost: evil.example\r\nOrigin") + b"Content-Length: 0\r\n\r\n",
        "no version": f"GET {path}\r\n\r\n".encode() + HIDDEN,
    }


def everything(address: tuple[str, int], raw: bytes, seconds: float = 10.0) -> bytes:
    """All that is answered until the server hangs up; TimeoutError where it does not."""
    with socket.create_connection(address, timeout=seconds) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            while piece := connection.recv(65536):
                found += piece
        return found
