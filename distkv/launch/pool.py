"""Several engines of one model on a Ray cluster, and what becomes of requests when one of them is lost."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import zmq
from msgspec.structs import replace

from distkv.engine.prefix_router import PrefixRouter, prefix_keys
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed, StepOutput
from distkv.engine.replay import Replay
from distkv.engine.stats import EngineStats, total
from distkv.errors import CapacityError, ConfigError, DistKVError, EngineUnavailable, RequestError, WorkerDied
from distkv.launch.pool_member import Member
from distkv.launch.ray_engine import REST, STEP_WAIT, RayEngine

log = logging.getLogger(__name__)

FAILURE_WINDOW = 600.0  # seconds in which at most `max_rank_failures` are made good
CHECK_SECONDS = 1.0  # after which the wait for the first engine looks whether it is still wanted
RETRY_SECONDS = 10.0  # after which an engine that found no room is started again
REFUSALS = CapacityError, RequestError  # of one request; nothing is wrong with the engine
MOST_RUNS = 3  # of a request whose engines are lost: it may be what they die of

StartOne = Callable[[int, bool, Callable[[], None]], RayEngine]
"""Starts the engine with this number, told whether it has run before, and calls what it is given now and then, which
raises when it is not wanted."""


class EnginePool:
    """An `EngineClient` over engines that start, run and die by themselves. It answers as soon as one of them does.

    A request goes to the engine that knows its beginning, as long as that has room. When a rank is lost, its engine is
    started anew, and whoever has room goes on with the engine's requests where they stood: their callers see a pause.
    """

    def __init__(
        self,
        start: StartOne,
        size: int,
        max_rank_failures: int,
        rebuild_timeout: float,
        check: Callable[[], None],
        release: Callable[[], None],
    ):
        """Starts all engines and waits for the first of them.

        Args:
            start: is called in threads, and for each engine as often as that is lost.
            max_rank_failures: see `EngineConfig`; the failure after the last one is raised.
            rebuild_timeout: see `EngineConfig`.
            check: called every now and then while this waits; what it raises ends the wait.
            release: called in the end, whatever that is.

        Raises what the engines have failed with when none of them starts.
        """
        self._start_one, self._max_failures, self._release = start, max_rank_failures, release
        self._rebuild_timeout = rebuild_timeout
        self._failures: deque[float] = deque()  # monotonic times
        self._members = [Member(number) for number in range(size)]
        self._waiting: dict[str, Replay] = {}  # for an engine that runs
        self._without_engine: float | None = None  # monotonic time since when there is none
        self._failed: list[StepOutput] = []  # to be told in the next step
        self._router = PrefixRouter()
        self._closed = False
        self._threads = ThreadPoolExecutor(size, "distkv-start")
        try:
            for member in self._members:
                self._start(member)
            self.info: EngineInfo = self._first_info(check)
            self._look_after()
        except BaseException:
            self.close()
            raise

    def add(self, requests: list[EngineRequest]) -> None:
        """See `EngineClient.add`. What waits for an engine is refused, if need be, once that is there."""
        placed: list[Replay] = []
        try:
            for request in requests:
                placed.append(Replay(request))
                self._place(placed[-1])
        except REFUSALS:
            self.abort([(replay.request.request_id, None) for replay in placed])
            raise

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """See `EngineClient.abort`."""
        for request_id, index in answers:
            for member in self._members:
                if request_id in member.replays and member.engine is not None:
                    member.engine.abort([(request_id, index)], reason)
            for replays in self._all_replays():
                if request_id in replays:
                    replays[request_id].close(index)
                    if not replays[request_id].is_open:
                        del replays[request_id]

    def step(self) -> list[StepOutput]:
        """See `EngineClient.step`: the engines run by themselves, and this waits a moment for what they sample."""
        self._look_after()
        outputs, self._failed = self._failed, []
        busy = [member for member in self._members if member.engine is not None and member.engine.has_work]
        self._wait_for(busy, 0 if outputs else STEP_WAIT)
        for member in busy:
            if member.engine is None:
                continue  # it was lost as another one's requests came to it
            try:
                outputs += self._passed_on(member, member.engine.step(0))
            except WorkerDied as death:
                self._lose(member, death)
        return outputs

    @property
    def has_work(self) -> bool:
        """See `EngineClient.has_work`."""
        return bool(
            self._failed
            or self._waiting
            or any(member.engine is not None and member.engine.has_work for member in self._members)
        )

    def rest(self) -> float | None:
        """See `EngineClient.rest`: engines may die, or be there again, while nobody waits for them."""
        if self._closed:
            return None
        self._look_after()
        return REST

    def check_ready(self) -> None:
        """See `EngineClient.check_ready`."""
        if seconds := self._seconds_without_engine():
            raise EngineUnavailable(
                f"no engine has run for {seconds:.0f} s, and one is started anew: {self._members[0].trouble}"
            )

    def stats(self) -> EngineStats:
        """The sum over the engines that run."""
        alone = self._seconds_without_engine()
        found = [EngineStats(0, 0, 0, len(self._waiting), num_engines=0, seconds_without_engine=alone)]
        for member in self._members:
            try:
                if member.engine is not None:
                    found.append(member.engine.stats())
            except WorkerDied as death:
                self._lose(member, death)
        return total(found)

    def reset_prefix_cache(self) -> None:
        """See `EngineClient.reset_prefix_cache`."""
        self._router = PrefixRouter()
        for member in self._members:
            try:
                if member.engine is not None:
                    member.engine.reset_prefix_cache()
            except WorkerDied as death:
                self._lose(member, death)

    def import_pages(self, path: str, cache_salt: str | None, start: int) -> tuple[int, int]:
        """See `EngineClient.import_pages`; refused, since each engine has a cache of its own."""
        raise ConfigError(
            "each of several engines has a cache of its own; use `distkv cache import` with the --cache-dir of each, "
            "cache_dir/engine-0, say, while none runs"
        )

    def close(self) -> None:
        """Closes all engines, side by side, and gives up those that start. Raises what one of them raises, as
        `RayEngine.close` does."""
        if self._closed:
            return
        self._closed = True
        try:
            ends = [self._threads.submit(member.close) for member in self._members]
            wait(ends)
        finally:
            self._threads.shutdown()
            self._release()
        for end in ends:
            end.result()

    # --- requests ---

    def _place(self, replay: Replay) -> None:
        """Gives a request to an engine, or has it wait for one; raises one of `REFUSALS` when the engine refuses it."""
        request = replay.request
        running = {member.name: member for member in self._members if member.engine is not None}
        if not running:
            self._waiting[request.request_id] = replay
            return
        loads = {name: self._load(member) for name, member in running.items()}
        keys = prefix_keys(request.prompt_token_ids, self.info.page_size, request.cache_salt)
        member = running[self._router.choose(keys, loads)]
        assert member.engine is not None
        again = replay.run()
        try:
            member.engine.add([again])
        except WorkerDied as death:
            member.replays[request.request_id] = replay
            self._lose(member, death)
            return
        member.replays[request.request_id] = replay
        if replay.closed:
            member.engine.abort([(request.request_id, index) for index in replay.closed])

    def _load(self, member: Member) -> float:
        return sum(replay.num_open for replay in member.replays.values()) / self.info.max_num_seqs

    def _passed_on(self, member: Member, outputs: Iterable[StepOutput]) -> list[StepOutput]:
        """What callers do not have yet of an engine's outputs."""
        passed = []
        for output in outputs:
            replay = member.replays.get(output.request_id)
            if replay is None:
                continue  # it was aborted
            new = replay.pass_on(output)
            if new is not None:
                passed.append(new)
            if not replay.is_open:
                del member.replays[output.request_id]
        return passed

    def _place_again(self, replays: Iterable[Replay]) -> None:
        for replay in replays:
            if replay.num_runs >= MOST_RUNS:
                self._fail(
                    replay, f"the engine was lost {replay.num_runs} times while this request ran; send it again, and "
                    "see the log for what the ranks died of", DistKVError,
                )  # fmt: skip
                continue
            try:
                self._place(replay)
            except REFUSALS as error:
                self._fail(replay, str(error), type(error))

    def _fail(self, replay: Replay, message: str, kind: type[DistKVError]) -> None:
        replay.close(None)
        self._failed.append(RequestFailed(replay.request.request_id, kind.__name__, message))

    def _all_replays(self) -> list[dict[str, Replay]]:
        return [self._waiting, *(member.replays for member in self._members)]

    # --- engines ---

    def _start(self, member: Member) -> None:
        member.starting = self._threads.submit(self._start_one, member.number, member.has_run, self._check_open)

    def _check_open(self) -> None:
        if self._closed:
            raise DistKVError("the engines were closed while one of them started")

    def _first_info(self, check: Callable[[], None]) -> EngineInfo:
        """Waits for the first engine."""
        starting = {member.starting for member in self._members if member.starting is not None}
        while True:
            done, _ = wait(starting, CHECK_SECONDS, FIRST_COMPLETED)
            check()
            for one in done:
                if one.exception() is None:
                    return replace(one.result().info, num_engines=len(self._members))
            if len(done) == len(starting):
                raise self._members[0].starting.exception()  # type: ignore[union-attr,misc]
            starting -= done

    def _look_after(self) -> None:
        """Takes in engines that have started, starts those whose time has come, and looks whether idle ones live."""
        now = time.monotonic()
        for member in self._members:
            if member.starting is not None and member.starting.done():
                self._take_in(member)
            elif member.leaving is not None and member.leaving.done():
                self._start_elsewhere(member)
            elif member.may_start and now >= member.start_at:
                self._start(member)
            elif member.leaves:
                self._leave(member)
            elif member.engine is not None and not member.engine.has_work and now - member.looked_at >= REST:
                member.looked_at = now
                try:
                    member.engine.rest()
                except WorkerDied as death:
                    self._lose(member, death)
        self._give_up_waiting(now)

    def _take_in(self, member: Member) -> None:
        """Has an engine that has started take part, or sees to one that could not be started."""
        starting, member.starting = member.starting, None
        assert starting is not None
        error = starting.exception()
        if error is None:
            member.engine, member.trouble, member.has_run = starting.result(), "", True
            log.info("engine %d of %d runs", member.number + 1, len(self._members))
            waiting, self._waiting = self._waiting, {}
            self._place_again(waiting.values())
        elif isinstance(error, WorkerDied):
            self._count_failure(error)
            member.start_at, member.trouble = time.monotonic() + 1.0, _what_happened(error)
            log.warning("engine %d is started again, since %s", member.number + 1, member.trouble)
        else:
            member.start_at = time.monotonic() + RETRY_SECONDS
            before, member.trouble = member.trouble, str(error) or type(error).__name__
            if member.trouble != before:
                log.warning(
                    "engine %d of %d cannot be started now, and this is tried again every %.0f s: %s",
                    member.number + 1, len(self._members), RETRY_SECONDS, error,
                    exc_info=None if isinstance(error, DistKVError) else error,
                )  # fmt: skip

    def _lose(self, member: Member, death: WorkerDied) -> None:
        """Sees to an engine that has ended by the death of a rank."""
        replays, member.replays, member.engine = member.replays, {}, None
        self._router.forget(member.name)
        self._count_failure(death)
        member.trouble = _what_happened(death)
        log.warning(
            "engine %d of %d is started anew, and its %d requests go on where they stood, since %s",
            member.number + 1, len(self._members), len(replays), member.trouble,
        )  # fmt: skip
        self._start(member)
        self._place_again(replays.values())

    def _leave(self, member: Member) -> None:
        """Has an engine save its pages and end before one of its nodes goes, which is no failure."""
        engine, replays = member.engine, member.replays
        assert engine is not None
        member.engine, member.replays, member.trouble = None, {}, "Ray drains its node"
        self._router.forget(member.name)
        log.warning(
            "engine %d of %d saves its pages and is started anew on other nodes, since Ray drains one of its own; its "
            "%d requests go on where they stood", member.number + 1, len(self._members), len(replays),
        )  # fmt: skip
        member.leaving = self._threads.submit(engine.close)
        for replay in replays.values():
            replay.num_runs -= 1  # this one was not lost by what the request does
        self._place_again(replays.values())

    def _start_elsewhere(self, member: Member) -> None:
        """Starts an engine in the place of one that has left its nodes."""
        leaving, member.leaving = member.leaving, None
        assert leaving is not None
        if error := leaving.exception():
            log.warning("engine %d of %d has left its node, but %s", member.number + 1, len(self._members), error)
        self._start(member)

    def _count_failure(self, death: WorkerDied) -> None:
        """Raises the death if there were too many."""
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] < now - FAILURE_WINDOW:
            self._failures.popleft()
        if len(self._failures) > self._max_failures:
            raise death

    def _give_up_waiting(self, now: float) -> None:
        """Ends requests that have waited for too long for any engine."""
        if any(member.engine is not None for member in self._members):
            self._without_engine = None
            return
        self._without_engine = self._without_engine or now
        if now - self._without_engine > self._rebuild_timeout:
            waiting, self._waiting = self._waiting, {}
            for replay in waiting.values():
                self._fail(
                    replay, f"no engine could be started anew for {self._rebuild_timeout:g} s (rebuild_timeout), and "
                    f"that is tried again: {self._members[0].trouble}", EngineUnavailable,
                )  # fmt: skip

    def _seconds_without_engine(self) -> float:
        since = self._without_engine
        return 0.0 if since is None else time.monotonic() - since

    def _wait_for(self, busy: list[Member], wait_ms: int) -> None:
        """Waits until one of the engines has something to say, or another one has started."""
        if not busy:
            starting = [member.starting for member in self._members if member.starting is not None]
            wait(starting, wait_ms / 1e3, FIRST_COMPLETED) if starting else time.sleep(wait_ms / 1e3)
            return
        if any(member.engine is not None and member.engine.has_unread for member in busy):
            return
        poller = zmq.Poller()
        for member in busy:
            assert member.engine is not None
            poller.register(member.engine.socket, zmq.POLLIN)
        poller.poll(wait_ms)


def _what_happened(death: WorkerDied) -> str:
    return f"rank {death.rank} on node {death.node} died: {death.cause}"
