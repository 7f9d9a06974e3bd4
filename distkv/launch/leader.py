"""What rank 0 of a Ray group runs: the engine loop, fed with requests over ZeroMQ."""

import logging
import time
from collections.abc import Callable

import zmq

from distkv.engine.engine import Engine
from distkv.engine.protocol import (
    Abort,
    Accepted,
    Add,
    EngineInfo,
    GetStats,
    ImportedPages,
    ImportPages,
    Logged,
    Refused,
    ResetPrefixCache,
    Saving,
    Shutdown,
    Tokens,
    Traced,
    Working,
)
from distkv.engine.request_bounds import check_request
from distkv.errors import CapacityError, ConfigError, RequestError, StoreError
from distkv.launch.owner import Owner
from distkv.metrics.ray_metrics import RayMetrics
from distkv.metrics.step_trace import StepTrace
from distkv.workers.group.log_lines import LogLine
from distkv.workers.group.rank_executor import RankExecutor

log = logging.getLogger(__name__)

IDLE_POLL = 1000  # milliseconds
TOLD_SECONDS = 1.0  # after which the owner is told that steps go on


def lead(
    executor: RankExecutor, client: zmq.Socket, take_log: Callable[[], list[LogLine]], info: EngineInfo, traces: bool
) -> None:
    """Serves the owner of the group on a PAIR socket until it sends Shutdown or is gone. It may have asked for a
    trace."""
    owner = Owner(client)
    trace = StepTrace(lambda events: owner.tell(Traced(events))) if traces else None
    sign = SignOfLife(owner, executor.progress)
    try:
        engine = Engine(info, executor, survives=False, observer=trace, waiting=sign.waits)
        _serve(engine, owner, take_log, RayMetrics(info, engine.meter), sign)
    finally:
        owner.tell(Logged(take_log()))


class SignOfLife:
    """Tells the owner that the ranks go on while nothing comes of it, see `Watchdog`."""

    def __init__(self, owner: Owner, progress: Callable[[], int]):
        """
        Args:
            progress: see `RankExecutor`.
        """
        self._owner, self._progress = owner, progress
        self._seen = 0
        self._told = time.monotonic()

    def waits(self) -> None:
        """A step takes long. That is told where its ranks get on with it."""
        seen, self._seen = self._seen, self._progress()
        if self._seen != seen:
            self.goes_on()

    def goes_on(self) -> None:
        """A step has ended."""
        if time.monotonic() - self._told >= TOLD_SECONDS:
            self._owner.tell(Working())
            self._told = time.monotonic()


def _serve(
    engine: Engine, owner: Owner, take_log: Callable[[], list[LogLine]], metrics: RayMetrics, sign: SignOfLife
) -> None:
    while True:
        if metrics.is_due:
            metrics.update(engine.stats())
        for command in owner.commands(0 if engine.has_work else IDLE_POLL):
            match command:
                case Add(requests):
                    try:
                        for request in requests:
                            check_request(request, engine.info)
                        engine.add(requests)
                        owner.tell(Accepted())
                    except (CapacityError, RequestError) as error:
                        owner.tell(Refused(str(error), type(error).__name__))
                case Abort(answers, reason):
                    engine.abort(answers, reason)
                case GetStats():
                    owner.tell(engine.stats())
                case ResetPrefixCache():
                    engine.reset_prefix_cache()
                    owner.tell(Accepted())
                case ImportPages(path, cache_salt, start):
                    try:
                        owner.tell(ImportedPages(*engine.import_pages(path, cache_salt, start)))
                    except (CapacityError, ConfigError, StoreError) as error:
                        owner.tell(Refused(str(error), _public_name(error)))
                case Shutdown(save_timeout):
                    engine.close(lambda num_unsaved: owner.tell(Saving(num_unsaved)), save_timeout)
                    return
        if owner.is_gone:
            log.warning("the process that owns this engine is gone, or its connection is; the ranks end")
            engine.close()
            return
        if outputs := engine.step():
            owner.tell(Tokens(outputs))
        elif engine.has_work:
            sign.goes_on()
        if lines := take_log():
            owner.tell(Logged(lines))


def _public_name(error: Exception) -> str:
    """The class that the other end knows it by."""
    return next(kind.__name__ for kind in (CapacityError, ConfigError, StoreError) if isinstance(error, kind))
