"""A client that may go away, and streams that tell it so."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distkv.server.errors import ApiError, api_error, openai_error
from distkv.server.json import encode, encode_ascii

KEEP_ALIVE_SECONDS = 15.0
"""After which a silent stream sends a comment, so that nobody in between takes it for dead."""
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    return _event(encode(data), name)


def error_event(data: Any, name: str | None = None) -> bytes:
    """The same for an error, which may repeat a client's words."""
    return _event(encode_ascii(data), name)


def _event(data: bytes, name: str | None) -> bytes:
    return (b"" if name is None else b"event: %s\n" % name.encode()) + b"data: %s\n\n" % data


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels what it holds when the client goes away, and ends without an error then. Raises ApiError where a body
    stops coming, which hides whether the client is still there."""
    failure: ApiError | None = None

    async def watch() -> None:
        nonlocal failure
        try:
            while (await receive())["type"] != "http.disconnect":
                """What is left of the body."""
        except ApiError as error:
            failure = error
        gone.reschedule(asyncio.get_running_loop().time())

    gone = asyncio.timeout(None)
    watcher = None
    try:
        async with gone:
            watcher = asyncio.create_task(watch())
            yield
    except TimeoutError:
        if not gone.expired():
            raise
        if failure is not None:
            raise failure from None
    finally:
        if watcher is not None:
            watcher.cancel()


async def reply(request: Request, work: Callable[[], Awaitable[Any]]) -> Response:
    """The JSON that some work comes to; it is cancelled when the client goes away."""
    async with while_connected(request.receive):
        return Response(encode(await work()), media_type="application/json")
    return Response(status_code=499)  # nobody reads it


class Answering(Protocol):
    """The answer to a request, which it gives in one of two ways."""

    async def whole(self) -> Any:
        """The body of the response."""

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of the response."""
        ...


async def respond(
    request: Request, answering: Answering, is_stream: bool, failed: Callable[[Exception], bytes]
) -> Response:
    """Gives it as it was asked for; `failed` as in `EventStream`."""
    if is_stream:
        return EventStream(answering.stream(), failed)
    return await reply(request, answering.whole)


def openai_failed(error: Exception) -> bytes:
    """The last events of a stream of OpenAI's that cannot go on."""
    return error_event(openai_error(api_error(error))) + DONE


class EventStream(Response):
    """Server-sent events. The status is sent with the first of them, so that an error before it has its own."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], failed: Callable[[Exception], bytes]):
        """`failed` gives the last events when an error comes after others."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._failed = events, failed
        self._last_sent: float | None = None  # by the monotonic clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client goes away."""
        beat = asyncio.create_task(self._keep_alive(send))
        try:
            async with while_connected(receive), aclosing(self._events) as events:
                try:
                    async for one in events:
                        await self._send(send, one)
                except Exception as error:
                    if self._last_sent is None:
                        raise
                    await self._send(send, self._failed(error))
                beat.cancel()
                await self._send(send, b"", is_last=True)
        except ApiError as error:
            if self._last_sent is None:
                raise
            beat.cancel()
            await self._send(send, self._failed(error), is_last=True)
        finally:
            beat.cancel()

    async def _send(self, send: Send, data: bytes, is_last: bool = False) -> None:
        is_first, self._last_sent = self._last_sent is None, time.monotonic()
        if is_first:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def _keep_alive(self, send: Send) -> None:
        begun = time.monotonic()
        while True:
            silent = time.monotonic() - (self._last_sent or begun)
            if silent >= KEEP_ALIVE_SECONDS:
                await self._send(send, b": still at it\n\n")
            else:
                await asyncio.sleep(KEEP_ALIVE_SECONDS - silent)
