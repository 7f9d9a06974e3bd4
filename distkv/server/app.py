"""The server as an ASGI application."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from distkv import __version__
from distkv.errors import DistKVError
from distkv.server.about import about_routes
from distkv.server.chat import chat_routes
from distkv.server.completions import completion_routes
from distkv.server.errors import api_error, error_response
from distkv.server.live import page_routes
from distkv.server.messages import message_routes
from distkv.server.middleware import BodyLimit, Failures, KeyGuard, RequestIds
from distkv.server.own import own_routes
from distkv.server.responses import response_routes
from distkv.server.service import Service
from distkv.server.validation import validation_error


def make_app(service: Service) -> FastAPI:
    """The application that serves a model; until that is loaded, most routes answer with status 503."""
    app = FastAPI(title="distkv", version=__version__, docs_url=None, redoc_url=None)  # whose pages are of a CDN
    for routes in (
        about_routes, completion_routes, chat_routes, response_routes, message_routes, own_routes, page_routes,
    ):  # fmt: skip
        app.include_router(routes(service))

    # the last one is the outermost
    app.add_middleware(BodyLimit, most=int(service.options.max_body_bytes))
    app.add_middleware(KeyGuard, key=service.options.api_key)
    app.add_middleware(Failures)
    app.add_middleware(RequestIds)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = validation_error(error)
        return error_response(request.url.path, api_error(error))

    for kind in (RequestValidationError, HTTPException, DistKVError):
        app.add_exception_handler(kind, refuse)
    return app
