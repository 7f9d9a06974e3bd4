"""Runs a server from its start to its end."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import uvicorn

from distkv.async_llm import AsyncLLM
from distkv.client.card import http_url, is_loopback
from distkv.config import EngineOptions
from distkv.errors import ConfigError
from distkv.server.app import make_app
from distkv.server.middleware import CutOff
from distkv.server.options import KEY_VARIABLE, ServerOptions
from distkv.server.registration import Registration, registered
from distkv.server.service import Service

log = logging.getLogger(__name__)

BACKLOG = 2048
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    model: str, folder: Callable[[], Path], options: ServerOptions, engine: EngineOptions, ready: Callable[[str], None]
) -> None:
    """Serves a model until SIGTERM or SIGINT, then ends what runs, and saves what the engine has to save.

    Args:
        model: what clients call it, unless `options` says otherwise.
        folder: finds the model's folder; it may take its time.
        ready: called with the server's URL as soon as requests are answered.

    Raises ConfigError for an address that cannot be listened on, and for a name that cannot be had, before the model is
    looked for; KeyboardInterrupt after SIGINT, and what `AsyncLLM` raises.
    """
    with closing(listen(options.host, options.port)) as listener:
        host, port = listener.getsockname()[:2]
        with registered(options.name, engine.get("ray_address"), host, port, options.api_key) as registration:
            service = Service(options.served_model_name or [model], options)
            server = _Server(service, registration)
            with server.handling_signals():
                warn_if_open(host, options.api_key)
                url = http_url(host, port)
                asyncio.run(_serve(server, service, listener, folder, engine, lambda: ready(url)))
    if server.is_interrupted:
        raise KeyboardInterrupt


def warn_if_open(host: str, api_key: str | None) -> None:
    """Warns of a server that anybody can use who reaches its machine."""
    if api_key is None and not is_loopback(host):
        log.warning(
            "distkv listens on %s without an API key: whoever reaches this port can use the model; set %s, or listen "
            "on 127.0.0.1", host, KEY_VARIABLE,
        )  # fmt: skip


async def _serve(
    server: "_Server", service: Service, listener: socket.socket, folder: Callable[[], Path], engine: EngineOptions,
    ready: Callable[[], None],
) -> None:  # fmt: skip
    async def load() -> None:
        try:
            path = await asyncio.to_thread(folder)
            async with await AsyncLLM.create(path, **engine) as llm:
                service.loaded(llm)
                ready()
                await stopped.wait()
        finally:
            server.should_exit = True

    stopped = asyncio.Event()
    loading = asyncio.create_task(load())
    try:
        await server.serve(sockets=[listener])
    finally:
        stopped.set()
        if not service.is_loaded:
            loading.cancel()
        await asyncio.wait([loading])
    if not loading.cancelled():
        loading.result()


class _Server(uvicorn.Server):
    """uvicorn's, which leaves it to `serve` what comes after a signal."""

    def __init__(self, service: Service, registration: Registration | None):
        options = service.options
        super().__init__(
            uvicorn.Config(
                CutOff(make_app(service)), lifespan="off", log_level=options.uvicorn_log_level, backlog=BACKLOG,
                timeout_graceful_shutdown=options.shutdown_timeout, server_header=False, ws="none",
            )
        )  # fmt: skip
        self.is_interrupted = False
        self._service, self._registration = service, registration

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, after which the name is looked after, if the server has one."""
        await super().startup(sockets)
        if self._registration is not None:
            self._registration.watch()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, before which the name is given up: nobody is to attach any more."""
        if self._registration is not None:
            self._registration.release()
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
        if self.should_exit:
            self.force_exit = True
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        signal.alarm(0)  # by which Ray's own handler aborts the process three seconds after SIGTERM
        self.should_exit = self._service.is_draining = True
        self.is_interrupted |= sig == signal.SIGINT


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the first address of a host; raises ConfigError where none can."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(BACKLOG)  # whoever finds the server by its name may come before it answers
            return found
        except BaseException:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        raise cannot_listen(host, port, str(error)) from error


def cannot_listen(host: str, port: int, why: str) -> ConfigError:
    """The error to raise for an address."""
    return ConfigError(f"{host!r}, port {port}, cannot be listened on ({why}); give another --host or --port")
