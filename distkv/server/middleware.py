"""What every request passes through before a route sees it: its id, the key, the limit of its body."""

import asyncio
import base64
import hmac
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distkv.server.errors import ApiError, api_error, error_response

OPEN_PATHS = ("/health", "/livez")
SILENCE_SECONDS = 30.0  # in the middle of a body
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Gives each request an id, the client's own `x-request-id` where it has sent one, as `scope["request_id"]`, and
    sends it back."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = scope["request_id"] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Failures:
    """Tells the client of an exception that no route has an answer for, which is a mistake of the server's."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            if has_begun or scope["type"] != "http":  # too late for another status: uvicorn logs it and hangs up
                raise
            await error_response(scope["path"], api_error(error))(scope, receive, send)


class KeyGuard:
    """Lets only those pass who send the key; anybody may ask for its health."""

    def __init__(self, app: ASGIApp, key: str | None):
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] == "http" and self._key is not None and scope["path"] not in OPEN_PATHS:
            given = [key.encode() for key in _keys(Headers(scope=scope))]
            # every one is compared, each in a time that does not tell how much of it is right
            if not any([hmac.compare_digest(key, self._key) for key in given]):
                what = "the API key is wrong" if given else "this server wants an API key"
                error = ApiError(401, f"{what}; send it as 'Authorization: Bearer KEY'")
                return await error_response(scope["path"], error)(scope, receive, send)
        await self._app(scope, receive, send)


def _keys(headers: Headers) -> list[str]:
    """What the client sends as its key: as OpenAI's clients do, as a browser does, as Anthropic's do."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    found = [headers[name] for name in ("x-api-key",) if name in headers]
    if kind.lower() == "bearer":
        found.append(value.strip())
    elif kind.lower() == "basic":
        with suppress(ValueError):  # of base64, of UTF-8, of what is no ASCII
            found.append(base64.b64decode(value.strip(), validate=True).decode().partition(":")[2])
    return found


class BodyLimit:
    """Refuses bodies of more bytes than this, before they are read where they say how long they are, and gives up those
    that stop coming."""

    def __init__(self, app: ASGIApp, most: int, others: Mapping[str, int] | None = None):
        """
        Args:
            others: paths with a limit of their own, that of cache_transfer_bytes.
        """
        self._app, self._most, self._others = app, most, others or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        most = self._others.get(scope["path"], self._most)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            return await error_response(scope["path"], self._error(scope["path"]))(scope, receive, send)
        num_read, is_whole = 0, False

        async def receive_some() -> Message:
            nonlocal num_read, is_whole
            if is_whole:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the rest of the body has not come for {SILENCE_SECONDS:.0f} s") from None
            num_read += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_read > most:
                raise self._error(scope["path"])
            return message

        await self._app(scope, receive_some, send)

    def _error(self, path: str) -> ApiError:
        option = "--cache-transfer-bytes" if path in self._others else "--max-body-bytes"
        most = self._others.get(path, self._most)
        return ApiError(413, f"the body has more than {most} bytes; send less, or raise {option}")


class CutOff:
    """Has requests that are cut off at the end of the server end without a traceback."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, whose task only uvicorn cancels."""
        with suppress(asyncio.CancelledError):
            await self._app(scope, receive, send)
