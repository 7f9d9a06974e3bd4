"""What clients talk to: the routes of the server, over all replicas of an engine."""

import asyncio
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from distkv.async_llm import AsyncLLM
from distkv.config import EngineConfig
from distkv.ray_serve.engine import ServeEngine
from distkv.server.app import make_app
from distkv.server.options import ServerOptions
from distkv.server.service import Service

HEALTH_CHECK_SECONDS = 1.0  # between two looks of Serve's
END_SECONDS = 6.0  # without such a look, after which this replica is to end: Serve checks none that it is ending


@serve.ingress()
class Ingress:
    """A Serve deployment. Text is made tokens here, and tokens text."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: DeploymentHandle, config: EngineConfig, options: dict[str, Any], names: list[str],
        num_engines: int,
    ):  # fmt: skip
        """Answers at once, most routes with status 503 until a replica has loaded the model.

        Args:
            options: fields of `ServerOptions`; a key that is not among them is that of the environment here.
            names: that clients call the model by.
            num_engines: most replicas that there will be.
        """
        self._service = Service(names, ServerOptions(**options))
        self._engine = ServeEngine(engines, serve.get_replica_context().replica_tag, num_engines)
        self._loop = asyncio.get_running_loop()
        self._checked = self._loop.call_later(END_SECONDS, self._drain)
        self._ending: asyncio.Task[None] | None = None
        self._loading = self._loop.create_task(self._load(config))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve's hook."""
        return make_app(self._service)

    async def check_health(self) -> None:
        """Raises what has kept the server from starting or keeps it from answering, so that Serve replaces it."""
        self._engine.check_alive()
        self._checked.cancel()
        if self._ending is not None:
            self._ending.cancel()
        self._checked = self._loop.call_later(END_SECONDS, self._drain)
        self._service.is_draining = False
        if self._loading.done():
            self._loading.result()

    async def _load(self, config: EngineConfig) -> None:
        self._service.loaded(await AsyncLLM.over(config, self._engine))

    def _drain(self) -> None:
        self._service.is_draining = True
        self._ending = self._loop.create_task(self._engine.end_with_engines())
