"""What whoever looks after the server asks of it: whether to send requests, and whether to start it anew."""

from fastapi import APIRouter
from starlette.responses import Response

from distkv.server.errors import ApiError, api_error
from distkv.server.service import LOADING_SECONDS, Service


def health_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["server"])

    @router.get("/health")
    async def health() -> Response:
        """Status 200 while requests can be answered; 503 while the model is loaded, when the engine has ended, and,
        with `Retry-After`, while it is started anew after a rank was lost or drained at its end."""
        _check_alive(service)
        try:
            await service.llm.check_ready()
        except Exception as error:
            code = api_error(error).code
            raise ApiError(503, str(error), code=code, retry_after=LOADING_SECONDS) from error
        return Response()

    @router.get("/livez")
    async def livez() -> Response:
        """Status 503 when the engine has ended for good, so that only a new process helps; else 200, also while the
        model is loaded or an engine is started anew."""
        if service.is_loaded:
            _check_alive(service)
        return Response()

    return router


def _check_alive(service: Service) -> None:
    """Raises ApiError when the engine has ended."""
    llm = service.llm
    try:
        llm.check_health()
    except Exception as error:
        raise ApiError(503, str(error), code=api_error(error).code) from error
