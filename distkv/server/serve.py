"""Runs the server of a model from its start to its end."""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from distkv.async_llm import AsyncLLM
from distkv.client.card import http_url
from distkv.config import EngineOptions
from distkv.engine.protocol import EngineInfo
from distkv.launch.this_machine import engine_hardware
from distkv.planner.hardware import Hardware
from distkv.server.app import make_app
from distkv.server.http_server import HttpServer
from distkv.server.listening import listen, warn_if_open
from distkv.server.options import ServerOptions
from distkv.server.registration import Registration, registered
from distkv.server.service import Service

log = logging.getLogger(__name__)

SEND_SECONDS = 5  # for clients to take the ends of answers, where not all the time is theirs

Loaded = Callable[[EngineInfo, Hardware | None], None]


def serve(
    model: str, folder: Callable[[], Path], options: ServerOptions, engine: EngineOptions,
    loaded: Loaded, ready: Callable[[str], None],
) -> None:  # fmt: skip
    """Serves a model until SIGTERM or SIGINT, then ends what runs, and saves what the engine has to save.

    Args:
        model: what clients call it, unless `options` says otherwise.
        folder: finds the model's folder; it may take its time.
        loaded: called, in a thread of its own, before requests are answered, with what the ranks run on, if that is
            known.
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
                asyncio.run(_serve(server, service, listener, folder, engine, loaded, lambda: ready(url)))
    if server.is_interrupted:
        raise KeyboardInterrupt


async def _serve(
    server: "_Server", service: Service, listener: socket.socket, folder: Callable[[], Path], engine: EngineOptions,
    loaded: Loaded, ready: Callable[[], None],
) -> None:  # fmt: skip
    async def load() -> None:
        try:
            path = await asyncio.to_thread(folder)
            async with await AsyncLLM.create(path, **engine) as llm:
                hardware = await asyncio.to_thread(engine_hardware, llm.config, llm.info)
                await asyncio.to_thread(loaded, llm.info, hardware)
                service.loaded(llm, hardware)
                ready()
                await server.drain(llm)
                server.should_exit = True
                await stopped.wait()
        finally:
            server.should_exit = True

    stopped = asyncio.Event()
    loading = asyncio.create_task(load())
    try:
        await server.serve(sockets=[listener])
    finally:
        server.ask_to_end()
        stopped.set()
        if not service.is_loaded:
            loading.cancel()
        await asyncio.wait([loading])
    if not loading.cancelled():
        loading.result()


class _Server(HttpServer):
    """The server of a model, which gives its name up before it stops to listen, if it has one."""

    def __init__(self, service: Service, registration: Registration | None):
        super().__init__(make_app(service), service.options)
        self._service, self._registration = service, registration
        self._asked, self._hurried = asyncio.Event(), asyncio.Event()  # by the first signal and the second

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, after which the name is looked after."""
        await super().startup(sockets)
        if self._registration is not None:
            self._registration.watch()

    async def drain(self, llm: AsyncLLM) -> None:
        """Waits for the first signal, gives the name up, so that nobody attaches any more, and waits until nothing
        runs. What does not end in time is ended, with a second signal all of it at once. Requests that come meanwhile
        are refused, and the health says so."""

        async def end() -> None:
            await llm.drain()
            await self._service.no_transfer.wait()  # and none begins any more

        await self._asked.wait()
        if self._registration is not None:
            self._registration.release()
        timeout = self._service.options.shutdown_timeout
        if self._service.num_open:
            log.warning(
                "new requests are refused; open answers: %d, which have %s to end; a second signal ends them at once",
                self._service.num_open, "all the time that they need" if timeout is None else f"{timeout} s",
            )  # fmt: skip
        draining, hurried = asyncio.create_task(end()), asyncio.create_task(self._hurried.wait())
        either: list[asyncio.Task[Any]] = [draining, hurried]
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if draining.done():
            draining.result()
        else:
            draining.cancel()
            await llm.drain(0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, before which the name is given up, if it was not yet."""
        if self._registration is not None:
            self._registration.release()
        if self._service.options.shutdown_timeout is not None or self._hurried.is_set():
            self.config.timeout_graceful_shutdown = SEND_SECONDS  # all answers have ended
        await super().shutdown(sockets)

    def ask_to_end(self) -> None:
        """What goes on without end, as `/live` does, ends at once, and so does the start."""
        self._service.is_draining = True
        self._asked.set()
        if not self._service.is_loaded:
            super().ask_to_end()

    def hurry(self) -> None:
        """Has the drain wait no more; after it, what is left are clients that do not take their answers."""
        self._hurried.set()
        if self.should_exit:
            super().hurry()
