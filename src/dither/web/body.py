"""Bodies that end at a limit, whether they announce their length or not."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope


class TooLargeError(HTTPException):
    """Ends the connection, as the rest of the body may still be on its way."""

    def __init__(self, most: int) -> None:
        super().__init__(413, f"the request is larger than {most} bytes", {"connection": "close"})


def limited(scope: Scope, receive: Receive, most: int) -> Receive:
    """`receive` for a body of at most `most` bytes.

    Raises TooLargeError now where more are announced, and while receiving as soon as more have come.
    """
    announced = Headers(scope=scope).get("content-length", "0")
    if not announced.isdecimal() or int(announced) > most:
        raise TooLargeError(most)
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise TooLargeError(most)
        return message

    return counted
