"""Bodies that end at a limit, whether they announce their length or not, and that do not take for ever."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope


class TooLargeError(HTTPException):
    """Ends the connection, as the rest of the body may still be on its way."""

    def __init__(self, most: int) -> None:
        super().__init__(413, f"the request is larger than {most} bytes", {"connection": "close"})


class TooSlowError(HTTPException):
    def __init__(self, seconds: float) -> None:
        super().__init__(408, f"the body did not arrive within {seconds:.0f} s", {"connection": "close"})


def limited(scope: Scope, receive: Receive, most: int, seconds: float | None = None) -> Receive:
    """`receive` for a body of at most `most` bytes, all of which must be there `seconds` from now.

    Raises TooLargeError now where more are announced, and while receiving as soon as more have come, TooSlowError
    while receiving where the rest is late.
    """
    announced = Headers(scope=scope).get("content-length", "0")
    if not announced.isdecimal() or int(announced) > most:
        raise TooLargeError(most)
    taken, whole, until = 0, False, None if seconds is None else time.monotonic() + seconds

    async def counted() -> Message:
        nonlocal taken, whole
        try:  # after the body one waits for the client to leave, however long that takes
            message = await asyncio.wait_for(receive(), until - time.monotonic() if until and not whole else None)
        except asyncio.TimeoutError:
            raise TooSlowError(seconds or 0.0) from None
        whole = not message.get("more_body", False)
        taken += len(message.get("body", b""))
        if taken > most:
            raise TooLargeError(most)
        return message

    return counted
