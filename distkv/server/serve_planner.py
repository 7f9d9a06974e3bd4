"""Serves the planner where no model is loaded."""

import asyncio
from collections.abc import Callable
from contextlib import closing

from fastapi import APIRouter, FastAPI
from starlette.responses import RedirectResponse, Response

from distkv.client.card import http_url
from distkv.server.guarded_app import guarded_app
from distkv.server.http_server import HttpServer
from distkv.server.listening import listen, warn_if_open
from distkv.server.options import ServerOptions
from distkv.server.page_files import page_file_routes
from distkv.server.plans import PlanStart, plan_routes


def serve_planner(start: PlanStart, options: ServerOptions, ready: Callable[[str], None]) -> None:
    """Serves the planner until SIGTERM or SIGINT.

    Args:
        start: with which the page begins.
        ready: called with the server's URL as soon as it is listened on.

    Raises ConfigError for an address that cannot be listened on, KeyboardInterrupt after SIGINT.
    """
    with closing(listen(options.host, options.port)) as listener:
        host, port = listener.getsockname()[:2]
        server = HttpServer(make_planner_app(start, options), options)
        with server.handling_signals():
            warn_if_open(host, options.api_key)
            ready(http_url(host, port))
            asyncio.run(server.serve(sockets=[listener]))
    if server.is_interrupted:
        raise KeyboardInterrupt


def make_planner_app(start: PlanStart, options: ServerOptions) -> FastAPI:
    """The planner as an ASGI application."""
    return guarded_app([_own_routes(), plan_routes(lambda: start), page_file_routes()], options)


def _own_routes() -> APIRouter:
    router = APIRouter(tags=["server"])

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """The only page that there is."""
        return RedirectResponse("plan")

    @router.get("/health")
    async def health() -> Response:
        """Status 200."""
        return Response()

    return router
