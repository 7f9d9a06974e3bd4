"""uvicorn's server with our way to end."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from distkv.server.accepting import accept, raise_file_limit
from distkv.server.http_connection import HttpConnection
from distkv.server.listening import BACKLOG
from distkv.server.middleware import SILENCE_SECONDS, CutOff
from distkv.server.options import ServerOptions

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HttpServer(uvicorn.Server):
    """uvicorn's, which leaves it to its caller what comes after a signal."""

    def __init__(self, app: ASGIApp, options: ServerOptions):
        super().__init__(
            uvicorn.Config(
                CutOff(app), lifespan="off", log_level=options.uvicorn_log_level, backlog=BACKLOG,
                timeout_graceful_shutdown=options.shutdown_timeout, server_header=False, ws="none",
                timeout_keep_alive=int(SILENCE_SECONDS),
            )
        )  # fmt: skip
        self.is_interrupted = self._is_asked = False
        self._accepting: list[asyncio.Task[None]] = []
        raise_file_limit()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, but for how connections are accepted."""
        assert sockets is not None
        await super().startup([])

        def make() -> HttpConnection:
            return HttpConnection(self.config, self.server_state, self.lifespan.state)

        connections = cast("set[HttpConnection]", self.server_state.connections)
        self._accepting = [asyncio.create_task(accept(one, make, connections)) for one in sockets]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, before which nothing is accepted any more."""
        for one in self._accepting:
            one.cancel()
        await asyncio.wait(self._accepting)
        await super().shutdown(sockets)

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """uvicorn's own handling, in whose place there is `handling_signals`."""
        return nullcontext()

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handles signals for as long as this lasts."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal has what runs end by itself, the second ends it, a third would end the process."""
        self.is_interrupted |= sig == signal.SIGINT
        signal.alarm(0)  # by which Ray's own handler aborts the process three seconds after SIGTERM
        if self._is_asked:
            self.hurry()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        else:
            self._is_asked = True
            self.ask_to_end()

    def ask_to_end(self) -> None:
        """Has what runs end by itself, and then the server."""
        self.should_exit = True

    def hurry(self) -> None:
        """Ends what still runs."""
        self.force_exit = True
