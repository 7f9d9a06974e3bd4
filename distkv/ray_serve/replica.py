"""A replica of a Serve application: one engine, whose ranks are actors in a placement group of their own."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ray import serve

from distkv.config import EngineConfig
from distkv.engine.client import OpenAnswers
from distkv.engine.loop import Broken, Delivery
from distkv.engine.protocol import EngineRequest, RequestFailed, StepOutput
from distkv.engine.thread import EngineThread
from distkv.errors import CapacityError, ConfigError, DistKVError, RequestError
from distkv.launch.launch import launch
from distkv.ray_serve.pieces import Piece, decode_request, encode
from distkv.storage.disk.file_lock import FileLock, HeldError

log = logging.getLogger(__name__)

PREDECESSOR_SECONDS = 30.0  # in which a replica that this one takes the place of lets go of its cache


class EngineReplica:
    """A Serve deployment. What it takes and gives is encoded, see `pieces.py`."""

    async def __init__(self, config: EngineConfig):  # type: ignore[misc]  # Serve awaits it
        """Loads the model; raises as `LLM` does, having freed everything."""
        context = serve.get_replica_context()
        self._name = context.replica_tag
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, _Stream] = {}  # by request
        self._lock: FileLock | None = None
        if config.cache_dir is not None:
            folder, self._lock = await _take_cache(Path(config.cache_dir), context.rank.rank)
            config = replace(config, cache_dir=folder)
        self._thread = EngineThread(partial(launch, config))
        try:
            self._info = await asyncio.to_thread(self._thread.wait)
        except BaseException:
            self._thread.give_up()
            raise

    async def stream(self, request: bytes, closed: list[int], avoid: dict[str, float]) -> AsyncIterator[bytes]:
        """Answers an `EngineRequest` with `Piece`s. Closing it ends the request.

        Args:
            closed: indexes of answers that are not wanted.
            avoid: for `PrefixRequestRouter`.
        """
        wanted = decode_request(request)
        stream = self._streams[wanted.request_id] = _Stream(wanted)
        try:
            self._thread.add([wanted], self._take)
            await self.abort([(wanted.request_id, index) for index in closed], "abort", self._name)
            async for outputs in stream.outputs():
                yield encode(Piece(self._name, outputs))
        except (_Lost, DistKVError) as lost:  # the second from an engine that is closed already
            yield encode(Piece(self._name, [], str(lost)))
        finally:
            del self._streams[wanted.request_id]
            if stream.is_open:
                self._thread.abort([(wanted.request_id, None)])

    async def abort(self, answers: list[tuple[str, int | None]], reason: str, replica: str) -> None:
        """Ends answers as `EngineClient.abort` does.

        Args:
            replica: for `PrefixRequestRouter`.
        """
        self._thread.abort(answers, reason)
        for request_id, index in answers:
            if request_id in self._streams:
                self._streams[request_id].close(request_id, index)

    async def info(self) -> bytes:
        """The engine's `EngineInfo`."""
        return encode(self._info)

    async def stats(self) -> bytes:
        """Its `EngineStats` of this moment."""
        return encode(await asyncio.wrap_future(self._thread.stats()))

    async def reset_prefix_cache(self) -> None:
        """Forgets the pages that are kept for later requests."""
        await asyncio.wrap_future(self._thread.reset_prefix_cache())

    async def check_health(self) -> None:
        """Raises what has ended the engine, a rank's death say; Serve replaces the replica then."""
        self._thread.check_alive()

    def __del__(self) -> None:
        """Serve calls it when the last request has ended: what is to be saved is saved."""
        if hasattr(self, "_thread"):
            self._thread.close()
        if (lock := getattr(self, "_lock", None)) is not None:
            lock.release()

    def _take(self, deliveries: list[Delivery]) -> None:
        """A `Sink` for all requests: one call per step reaches the event loop."""
        self._loop.call_soon_threadsafe(self._sort, deliveries)

    def _sort(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.request_id in self._streams:
                self._streams[delivery.request_id].take(delivery)


class _Lost(Exception):
    """The engine has ended under a request."""


class _Stream:
    """What has come of a request and was not sent yet."""

    def __init__(self, request: EngineRequest):
        self._answers = OpenAnswers()
        self._answers.add([request])
        self._unsent: list[StepOutput] = []
        self._lost: str | None = None
        self._due = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether the engine has more to do for it."""
        return bool(self._answers) and self._lost is None

    def take(self, delivery: Delivery) -> None:
        """Adds what has come."""
        if isinstance(delivery, Broken):
            self._break(delivery.request_id, delivery.error)
        else:
            self._unsent.append(delivery)
            self._answers.take([delivery])
        self._due.set()

    def close(self, request_id: str, index: int | None) -> None:
        """Ends an answer, with None all of them."""
        self._answers.close([(request_id, index)])
        self._due.set()

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        """All that has come since the time before, until nothing more will. Raises _Lost."""
        while True:
            if self._unsent:
                unsent, self._unsent = self._unsent, []
                yield unsent
            elif self._lost is not None:
                raise _Lost(self._lost)
            elif not self._answers:
                return
            else:
                await self._due.wait()
                self._due.clear()

    def _break(self, request_id: str, error: BaseException) -> None:
        if isinstance(error, DistKVError) and not isinstance(error, CapacityError | RequestError):
            self._lost = str(error)
            return
        name = type(error).__name__ if isinstance(error, DistKVError) else "DistKVError"
        message = str(error) or type(error).__name__
        self._unsent.append(RequestFailed(request_id, name, message))
        self._answers.close([(request_id, None)])


async def _take_cache(cache_dir: Path, rank: int) -> tuple[Path, FileLock]:
    """The sub-folder for this replica's pages, locked: two engines cannot share one. It is that of the rank, whose
    pages the replica before has left there; where somebody goes on using that, as when Serve gives out ranks anew, the
    first one that is free.

    Raises ConfigError when no folder can be made there.
    """
    deadline = asyncio.get_running_loop().time() + PREDECESSOR_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        with suppress(HeldError):
            return _lock(cache_dir, rank)
        await asyncio.sleep(0.2)
    for number in itertools.count():
        with suppress(HeldError):
            taken = _lock(cache_dir, number)
            if number != rank:
                log.warning("another process uses the pages of replica %d; this one has those of %d", rank, number)
            return taken
    raise AssertionError


def _lock(cache_dir: Path, number: int) -> tuple[Path, FileLock]:
    folder = cache_dir / f"replica-{number}"
    try:
        return folder, FileLock(folder / "replica.lock")
    except OSError as error:
        raise ConfigError(
            f"cache_dir {cache_dir} cannot be used ({error}); name a folder that can be written"
        ) from error
