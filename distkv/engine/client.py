"""What a front end knows of an engine, wherever that runs."""

from collections.abc import Iterable
from typing import Protocol

from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed, StepOutput, TokenOutput
from distkv.engine.stats import EngineStats


class EngineClient(Protocol):
    """An engine in this process or on a cluster. One thread at a time may call it."""

    info: EngineInfo

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests. Raises CapacityError, and queues none, when one of them could never run."""

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """Ends answers `(request id, index)`, with index None all of a request; ended ones are passed over.

        Args:
            reason: which they are counted by, see `RequestStats.finished`.
        """

    def step(self) -> list[StepOutput]:
        """Goes on with the work; returns the tokens that have come of it, if any, and the requests that cannot go on.

        Raises WorkerDied when a rank is lost, DistKVError when a device fails: nothing goes on then.
        """
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        ...

    def rest(self) -> float | None:
        """Called when nothing is to do. Returns the seconds after which it is to be called once more, None for never.

        Raises WorkerDied when a rank is lost.
        """
        ...

    def check_ready(self) -> None:
        """Raises DistKVError while requests wait until an engine that was lost has been started anew. Any thread may
        call it; it waits for nothing."""

    def stats(self) -> EngineStats:
        """What the engine tells of itself."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets the pages that are kept for later requests."""

    def import_pages(self, path: str, cache_salt: str | None, start: int) -> tuple[int, int]:
        """Takes pages of an exported cache in, from number `start` on; returns the number to go on with, that of all
        pages in the end, and how many were not there before. Raises ConfigError, CapacityError and StoreError."""
        ...

    def close(self) -> None:
        """Frees everything."""


class OpenAnswers:
    """Which answers of which requests an engine has still to finish."""

    def __init__(self) -> None:
        self._indexes: dict[str, set[int]] = {}

    def __len__(self) -> int:
        """Requests with an open answer."""
        return len(self._indexes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._indexes

    def add(self, requests: Iterable[EngineRequest]) -> None:
        """Opens the answers of new requests: all of them, or those that were begun elsewhere."""
        for request in requests:
            self._indexes[request.request_id] = set(request.begun or range(request.params.n))

    def close(self, answers: Iterable[tuple[str, int | None]]) -> None:
        """Closes answers as `EngineClient.abort` ends them."""
        for request_id, index in answers:
            indexes = self._indexes.get(request_id, set())
            indexes.discard(index) if index is not None else indexes.clear()
            if not indexes:
                self._indexes.pop(request_id, None)

    def take(self, outputs: Iterable[StepOutput]) -> None:
        """Closes the answers that these outputs end."""
        for output in outputs:
            if isinstance(output, RequestFailed):
                self.close([(output.request_id, None)])
            elif isinstance(output, TokenOutput) and output.finish_reason is not None:
                self.close([(output.request_id, output.index)])
