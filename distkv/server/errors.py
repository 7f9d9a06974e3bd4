"""What a client is told when its request fails: a status, and a body in the shape of the API that it speaks."""

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from distkv.errors import CapacityError, ConfigError, DistKVError, Draining, EngineUnavailable, QueueFull, RequestError
from distkv.server.json import encode_ascii

log = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
"""Anthropic's words by status; below 500 there is else invalid_request_error."""
ENGINE_RETRY_SECONDS = 5  # after which a server that is drained may be another one, and a lost engine be there again
RETRY_SECONDS = 1  # after which a client may try again that has found the queue full
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class ApiError(HTTPException):
    """A request that fails with this status; FastAPI lets it pass wherever it is raised.

    Args:
        message: what is wrong and what to do about it.
        param: the field of the body that it is about.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ):  # fmt: skip
        super().__init__(status, message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.code = CODES.get(status) if code is None else code


def api_error(error: BaseException) -> ApiError:
    """Any exception as what its client is told. What is no mistake of the client's and nothing that distkv raises on
    purpose is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # of the framework's: no such route or method, a body that is no JSON
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), retry_after=RETRY_SECONDS)
    if isinstance(error, RequestError | ConfigError | CapacityError):
        return ApiError(400, str(error), code=type(error).__name__)
    if isinstance(error, Draining | EngineUnavailable):
        return ApiError(503, str(error), code=type(error).__name__, retry_after=ENGINE_RETRY_SECONDS)
    if type(error) is DistKVError and error.output is not None:  # it would fail again, of NaN in the weights, say
        return ApiError(500, str(error), code=type(error).__name__)
    if isinstance(error, DistKVError):  # the engine has ended, or what it had stored cannot be read
        return ApiError(503, str(error), code=type(error).__name__)
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed on this request ({type(error).__name__}); its log has more")


def openai_error(error: ApiError) -> dict[str, Any]:
    """The body of OpenAI's API."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body of Anthropic's API."""
    kind = TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The body for who has asked for this path."""
    return anthropic_error(error) if path.startswith("/v1/messages") else openai_error(error)


def error_response(path: str, error: ApiError) -> Response:
    """The whole answer to who has asked for this path."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:  # a browser that opens the page is to ask for the key
        headers["www-authenticate"] = "Bearer" if path.startswith("/v1/") else 'Basic realm="distkv", charset="UTF-8"'
    return Response(encode_ascii(error_body(path, error)), error.status, headers, "application/json")
