"""A connection, for as long as something may come of it."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from distkv.server.middleware import SILENCE_SECONDS

MOST_HEAD_BYTES = 2**18  # of a request's line and headers
BUSY = object()  # in place of a request that was over
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class HttpConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, which closes when no request comes, or one whose headers do not end: uvicorn waits for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait."""
        super().connection_made(transport)
        self._num_bytes = 0  # that have come and are no request yet
        self._over: Any = None  # the request that had been answered at the last look, and was the newest; or none yet
        self._heard = self.loop.time()
        self._deadline = self.loop.call_later(SILENCE_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the wait."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes in a part of a request."""
        self._heard = self.loop.time()
        super().data_received(data)
        self._num_bytes = self._num_bytes + len(data) if self._is_idle else 0
        if self._num_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def give_way(self, seconds: float) -> None:
        """Closes if nothing has come for so long and nothing is to be answered: others wait for a connection."""
        if self._is_idle and self.loop.time() - self._heard >= seconds:
            self.transport.close()

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered, nor is the rest of a body to come."""
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _look(self) -> None:
        """Closes where no request has come since the last look, at which none was being answered."""
        if self._is_idle and self.cycle is self._over:
            self.transport.close()
            return
        self._over = self.cycle if self._is_idle else BUSY
        self._deadline = self.loop.call_later(SILENCE_SECONDS, self._look)
