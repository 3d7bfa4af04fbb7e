"""Server-sent events: whoever listens hears of every change, from whatever thread it is told.

A listener that does not read loses its oldest events, not our memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from dither.errors import UsageError

_MOST_LISTENERS, _MOST_KEPT = 64, 256
_SIGN_OF_LIFE = 15.0  # seconds; also how a listener's leaving is noticed


class Hub:
    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[str | None]] = set()
        self.loop: asyncio.AbstractEventLoop | None = None  # while anybody may listen

    def close(self) -> None:
        """Ends every listening.  From the loop's thread."""
        self.loop = None
        self._put(None)

    def publish(self, message: dict[str, Any]) -> None:
        """From any thread."""
        if (loop := self.loop) is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._put, f"data: {json.dumps(message)}\n\n")

    def _put(self, text: str | None) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(text)

    def listen(self) -> AsyncIterator[str]:
        """Raises UsageError where too many listen already."""
        if len(self._listeners) >= _MOST_LISTENERS:
            raise UsageError("this page", f"is open {_MOST_LISTENERS} times", "Close some of them.")
        return self._listening()

    async def _listening(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[str | None] = asyncio.Queue(_MOST_KEPT)
        self._listeners.add(queue)
        try:
            yield ": here\n\n"
            while self.loop is not None:
                text: str | None = ":\n\n"
                with contextlib.suppress(asyncio.TimeoutError):
                    text = await asyncio.wait_for(queue.get(), _SIGN_OF_LIFE)
                if text is None:
                    return
                yield text
        finally:
            self._listeners.discard(queue)
