"""What every server has around its routes: guards, and errors as its clients read them."""

from collections.abc import Iterable

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from distkv import __version__
from distkv.client.wire import IMPORT
from distkv.errors import DistKVError
from distkv.server.errors import api_error, error_response
from distkv.server.middleware import BodyLimit, Failures, KeyGuard, RequestIds
from distkv.server.options import ServerOptions
from distkv.server.validation import validation_error


def guarded_app(routers: Iterable[APIRouter], options: ServerOptions) -> FastAPI:
    """An ASGI application of these routes."""
    app = FastAPI(title="distkv", version=__version__, docs_url=None, redoc_url=None)  # whose pages are of a CDN
    for router in routers:
        app.include_router(router)

    # the last one is the outermost
    transfer = options.cache_transfer_bytes
    larger = {} if transfer is None else {IMPORT: int(transfer)}
    app.add_middleware(BodyLimit, most=int(options.max_body_bytes), others=larger)
    app.add_middleware(KeyGuard, key=options.api_key)
    app.add_middleware(Failures)
    app.add_middleware(RequestIds)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = validation_error(error)
        return error_response(request.url.path, api_error(error))

    for kind in (RequestValidationError, HTTPException, DistKVError):
        app.add_exception_handler(kind, refuse)
    return app
