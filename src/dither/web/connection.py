"""What happens on a connection before there is a request: uvicorn's protocol, with a clock and our manners.

uvicorn waits for the head of a request for as long as a client cares to take, so that a few hundred sockets
that send a byte now and then keep everybody else out.  Here a head must be whole within `HEAD_SECONDS`;
bodies and answers that nobody takes are bounded by each server (`body.py`, `serving/relay.py`).

Two programs that read one request differently let a stranger hide a second one inside it.  So what may be read
in two ways is no request: a length beside a transfer coding (RFC 9112, section 6.3, allows to refuse it), and an
end of a line without its carriage return (section 2.2 allows it; proxies differ).  h11 refuses the others: two
lengths, codings it does not know, white space before a colon.

Sources: RFC 9112, sections 2.2, 6.3 and 9.5; uvicorn's `H11Protocol`; h11's "Connection object" states.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
MOST_HEAD = 65_536  # bytes
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_TWO_READINGS = re.compile(rb"(?<!\r)\n|\n[ \t]")  # a bare line feed; a line that continues the one before


class _Strict(h11.Connection):
    """h11 without what it forgives."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            waiting = self.trailing_data[0]
            end = _END_OF_HEAD.search(waiting)
            if _TWO_READINGS.search(waiting, 0, end.end() if end else len(waiting)):
                raise h11.RemoteProtocolError("lines that two programs may read in two ways")
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            if b"transfer-encoding" in names and b"content-length" in names:
                raise h11.RemoteProtocolError("a length beside a transfer coding")
        return event


class Connection(H11Protocol):
    """Each server derives its own, with its own words for what is no HTTP."""

    refusal: ClassVar[bytes]  # JSON
    _clock: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *arguments: Any, **more: Any) -> None:
        super().__init__(config, *arguments, **more)
        self.conn = _Strict(h11.SERVER, MOST_HEAD)

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
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(self.refusal)).encode()),
                (b"connection", b"close"),
            ]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=self.refusal), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
