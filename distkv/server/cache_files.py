"""What was read, to a client as a zip file that is made as it is sent, and from one.

Clients name no file: an export goes into none here, and an import lies beside the cache while it is taken in.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distkv.client import wire
from distkv.errors import ConfigError, Draining, RequestError, StoreError
from distkv.server.connection import while_connected
from distkv.server.errors import ApiError
from distkv.server.schemas.body import Body
from distkv.server.service import Service

ZIP = "application/zip"
ZIP_BODY: dict[str, Any] = {"requestBody": {"content": {ZIP: {"schema": {"type": "string", "format": "binary"}}}}}
PIECE_BYTES = 2**20  # of a body, that are written at a time
POLL_SECONDS = 0.05
RETRY_SECONDS = 5
STALLED_SECONDS = 60.0  # after which a client that takes nothing of an export gets no more
LEFT_SECONDS = 3600.0  # after which what came of an import that was killed is removed
PREFIX, SUFFIX = ".import-", ".zarr.zip"


Work = Callable[[Callable[[bytes], None]], None]
"""Writes a file by what it is given."""


class Export(Body):
    """What is to be in the file."""

    prompts: list[str | list[int]] = Field(default=[], description="Texts or token ids that were read.")
    sessions: list[str] = Field(default=[], description="Names of sessions, whose messages are in the file too.")
    all: bool = Field(default=False, description="The pages of all prompts of the salt.")
    cache_salt: str | None = Field(default=None, description="That of the requests which made the pages.")


@contextmanager
def one_transfer(service: Service) -> Iterator[None]:
    """No other begins meanwhile: each has a thread, and a file on the cache's disk or what waits to be sent. Raises
    ApiError where transfers are not allowed or one is under way, Draining when none is to begin any more."""
    if service.options.cache_transfer_bytes is None:
        raise ApiError(403, "this server exports and imports no cache; start it with --cache-transfer-bytes SIZE")
    if service.is_draining:
        raise Draining("the server is about to end and begins no export or import; ask another one, or later")
    if not service.no_transfer.is_set():
        raise ApiError(429, "another export or import is under way; try again", retry_after=RETRY_SECONDS)
    service.no_transfer.clear()
    try:
        yield
    finally:
        service.no_transfer.set()


def cache_file_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["distkv"])

    @router.post(wire.EXPORT, responses={200: {"content": {ZIP: {}}}}, response_class=Response)
    async def export_cache(body: Export) -> Response:
        """A zip file, which is a Zarr store, of what was read and is on disk, for /cache/import of servers of the same
        weights. One that is cut off is no whole zip file."""
        from distkv.cache_folders.export_store import sent_zip  # imports zarr

        llm, prompts = service.llm, body.prompts

        def work(write: Callable[[bytes], None]) -> None:
            llm.export_to(
                sent_zip(write), prompts, sessions=body.sessions, everything=body.all, cache_salt=body.cache_salt
            )

        return _Sent(lambda: one_transfer(service), work)

    @router.post(wire.IMPORT, openapi_extra=ZIP_BODY)
    async def import_cache(request: Request, cache_salt: str | None = None) -> dict[str, int]:
        """Takes such a file in, whole or not at all, while requests run. Send only what you trust: nothing shows
        whether pages are those of their tokens."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != ZIP:
            raise RequestError(f"the body must be a zip file, sent with 'content-type: {ZIP}'")
        cache_dir = service.llm.config.cache_dir
        if cache_dir is None:
            raise ConfigError("pages are imported to disk; start the server with --cache-dir")
        with one_transfer(service), _uploaded(Path(cache_dir)) as file:
            await _receive(request, file)
            try:
                imported = await service.llm.import_cache(file.name, cache_salt=cache_salt)
            except (StoreError, ConfigError) as error:
                message = str(error).replace(repr(file.name), "the file")
                raise ApiError(400, message, code=type(error).__name__) from error
        return {"num_pages": imported.num_pages, "num_new": imported.num_new}

    return router


class _Sent(Response):
    """A file that is sent as it is made. The status is sent with its first piece, so that an error before that has its
    own; one that comes later ends the connection in the middle of the body."""

    media_type = ZIP

    def __init__(self, guard: Callable[[], AbstractContextManager[None]], work: Work):
        """
        Args:
            guard: what is held meanwhile.
            work: writes the file, in a thread; what it is given waits for the client, and raises when that is gone.
        """
        super().__init__(headers={"content-disposition": f'attachment; filename="cache{SUFFIX}"'})
        del self.headers["content-length"]
        self._guard, self._work = guard, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        has_begun = False
        with self._guard():
            async with while_connected(receive), aclosing(_pieces(self._work)) as pieces:
                async for piece in pieces:
                    async with asyncio.timeout(STALLED_SECONDS):
                        if not has_begun:
                            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                            has_begun = True
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _pieces(work: Work) -> AsyncGenerator[bytes, None]:
    """What some work writes, which is a piece ahead at most."""
    loop, pieces, is_over = asyncio.get_running_loop(), asyncio.Queue[bytes](1), threading.Event()

    def write(piece: bytes) -> None:
        if is_over.is_set():
            raise StoreError("the client is gone")
        asyncio.run_coroutine_threadsafe(pieces.put(piece), loop).result(2 * STALLED_SECONDS)

    thread = ThreadPoolExecutor(1, "distkv-export")
    working: asyncio.Future[Any] = loop.run_in_executor(thread, work, write)
    thread.shutdown(wait=False)
    try:
        while not working.done() or not pieces.empty():
            getting = asyncio.ensure_future(pieces.get())
            both: list[asyncio.Future[Any]] = [getting, working]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                getting.cancel()  # which does nothing to one that has come to its end
            if getting.done():
                yield getting.result()
        await working
    finally:
        is_over.set()
        while not working.done():
            with suppress(asyncio.QueueEmpty):
                pieces.get_nowait()
            await asyncio.sleep(POLL_SECONDS)
        working.exception()  # which nobody is left to hear of, where it has not been raised


@contextmanager
def _uploaded(cache_dir: Path) -> Iterator[IO[bytes]]:
    """A file beside the cache, which is removed in the end; and so is what a killed server has left."""
    try:
        for left in cache_dir.glob(f"{PREFIX}*{SUFFIX}"):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()
        file = NamedTemporaryFile(dir=cache_dir, prefix=PREFIX, suffix=SUFFIX)  # noqa: SIM115, closed below
    except OSError as error:
        raise ConfigError(f"cache_dir takes no file ({error.strerror}); let it be written") from error
    with file:
        yield file


async def _receive(request: Request, file: IO[bytes]) -> None:
    """Writes a body to a file."""
    waiting = bytearray()
    try:
        async for piece in request.stream():
            waiting += piece
            if len(waiting) >= PIECE_BYTES:
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(file.write, bytes(waiting))
        await asyncio.to_thread(file.flush)
    except OSError as error:
        raise ApiError(507, f"the file cannot be written ({error.strerror}); make room on the server's disk") from error
    except ClientDisconnect:
        raise ApiError(499, "the client is gone") from None  # nobody reads it
