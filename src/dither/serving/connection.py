"""What happens on a connection before there is a request: uvicorn's protocol, with a clock and our manners.

uvicorn waits for the head of a request for as long as a client cares to take, so that a thousand sockets
that send a byte now and then keep everybody else out.  Here a head must be whole within `HEAD_SECONDS`;
bodies have a limit of their own (`app.py`), and so have answers that nobody takes (`relay.py`).  What is
not HTTP is refused in OpenAI's form, like all the rest.

Sources: RFC 9112, sections 2.2 and 9.5; uvicorn's `H11Protocol`; h11's "Connection object" states.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dither.serving.errors import invalid

HEAD_SECONDS = 30.0


class Connection(H11Protocol):
    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The clock runs from the first moment without a whole head to the last."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_clock()
        elif self._clock is None:
            self._clock = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def send_400_response(self, msg: str) -> None:
        """Also called where an answer is under way already: all that is left then is to hang up.

        A request whose body turned out to be none may have its answer still before it: it is told that its
        client has left."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = invalid(None, "this is not a request in HTTP/1.1", "invalid_http").encoded()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
