"""A connection, for as long as something may come of it."""

import asyncio
from collections import deque

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from distkv.server.middleware import SILENCE_SECONDS

MOST_HEAD_BYTES = 2**18  # of a request's line and headers
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class HttpConnection(HttpToolsProtocol):
    """uvicorn's, which closes when no request comes, or one whose headers do not end: uvicorn waits for ever. A request
    is over with its answer, even if its body has not come by then; and when the client goes, all that it has sent and
    that are not answered are told, of which uvicorn tells the last. That it goes is not seen while a request that came
    behind one which runs waits for its turn, since uvicorn reads no further then."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait."""
        super().connection_made(transport)
        self._num_bytes = 0  # that have come since anything could be made of some
        self._unanswered: deque[RequestResponseCycle] = deque()  # in the order in which they are answered
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the wait."""
        self._deadline.cancel()
        self._unset_keepalive_if_required()  # which uvicorn leaves when the connection is reset
        for one in self._unanswered:
            one.disconnected = True
            one.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes in a part of a request."""
        self._heard = self.loop.time()
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            if not self._unanswered:  # or the client would take it for a part of an answer
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """There is a request."""
        self._num_bytes = 0
        self._deadline.cancel()
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """There is a part of its body."""
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes now is the next one."""
        self._num_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request has been answered."""
        self._unanswered.popleft()
        super().on_response_complete()
        if not self._unanswered:
            self._await_request()

    def send_400_response(self, msg: str) -> None:
        """What came is no request."""
        if self._unanswered:  # the client would take it for a part of an answer
            self.transport.close()
        else:
            super().send_400_response(msg)

    def give_way(self, seconds: float) -> None:
        """Closes if nothing has come for so long and nothing is to be answered: others wait for a connection."""
        if not self._unanswered and self.loop.time() - self._heard >= seconds:
            self.transport.close()

    def _await_request(self) -> None:
        """Closes, unless the headers of a request have come by then."""
        self._heard = self.loop.time()
        self._deadline = self.loop.call_later(SILENCE_SECONDS, self.transport.close)
