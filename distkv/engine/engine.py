"""The engine loop: prepares a step, has the ranks run it, adds what it sampled to the answers, ends what is done.

While a step runs, the next one is prepared. That is started as soon as the ranks have reported on the first, whatever
their devices are still at. The tokens that the first sampled may not be known then; the next step refers to them. They
are read while it runs, and only then is it looked at which answers they end; so an answer that ends by its tokens is
run for one token too many, which is dropped.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor as Thread
from typing import TYPE_CHECKING

from distkv.engine.answers import Answers
from distkv.engine.engine_stats import engine_stats
from distkv.engine.fault_search import FaultSearch
from distkv.engine.fork_copies import ForkCopies
from distkv.engine.observer import StepObserver
from distkv.engine.preparation import Preparation
from distkv.engine.protocol import EngineInfo, EngineRequest, StepOutput
from distkv.engine.repairs import Repairs
from distkv.engine.request_meter import RequestMeter
from distkv.engine.saving import FinalSave
from distkv.engine.scheduler import Scheduler
from distkv.engine.sequence import Scheduled
from distkv.engine.speculation.methods import make_speculator
from distkv.engine.stats import EngineStats
from distkv.engine.step import Step
from distkv.engine.step_runner import StepRunner
from distkv.errors import CapacityError, DistKVError, RequestError
from distkv.workers.group.executor import Executor

if TYPE_CHECKING:
    from distkv.engine.cache_import import CacheImport

log = logging.getLogger(__name__)


class Engine:
    """Works on tokens alone; an `EngineClient`. Not for several threads at a time; steps run on a thread of its own."""

    def __init__(
        self,
        info: EngineInfo,
        executor: Executor,
        close: Callable[[], None] = lambda: None,
        survives: bool = True,
        observer: StepObserver | None = None,
        thread: Thread | None = None,
        waiting: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            close: called when the engine is closed.
            survives: a step that raises leaves the ranks fit for others, so that the sequence at fault can be found.
            observer: is told how steps go.
            thread, waiting: see `StepRunner`.
        """
        self.info = info
        self._close = close
        self._survives = survives
        self._observer = observer or StepObserver()
        self._scheduler = Scheduler(info)
        self._cache = self._scheduler.cache
        self._runner = StepRunner(info, executor, self._cache, thread, self._observer.measured, waiting)
        if info.speculation is not None:
            self._scheduler.speculator = make_speculator(info, self._runner.draft, self._cache)
        self._repairs = Repairs(self._cache, self._runner, info.page_size)
        self._copies = ForkCopies(self._cache)
        self._answers = Answers(info, self._scheduler, self._copies, self._runner)
        self._preparation = Preparation(self._scheduler, self._copies, self._runner)
        self._faults = FaultSearch()
        self._running: Step | None = None  # the ranks have it
        self._unread: Step | None = None  # completed, but for its tokens
        self._import: CacheImport | None = None
        self._failure: Exception | None = None  # of the device; nothing goes on after it
        self._num_preemptions = 0
        self._is_drained = True  # nothing moves and nothing is to be saved

    def step(self) -> list[StepOutput]:
        """Goes on by a step; returns tokens that were sampled, if any have come, and the requests that cannot go on.

        Raises DistKVError when the device fails; nothing goes on after that.
        """
        if self._failure is not None:
            raise self._failure
        self._observer.begun()
        self._read()  # what an exception has left over
        running, scheduled = self._running, self._schedule()
        following = self._prepare(scheduled)  # while the ranks are at the running one
        try:
            if running is not None:
                if not self._complete(running, following):
                    following, scheduled = None, []
                elif following is None:
                    following = self._prepare(scheduled)  # in the room that the running one has left
            if following is not None:
                self._start(following)
        except BaseException:
            if following is not None and following is not self._running:
                following.undo()
            raise
        if running is None and not scheduled:
            self._do_without_step()
        self._read()  # while the ranks are at the following one
        self._observer.emitted(self._answers.outputs)
        return self._answers.take()

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests; raises CapacityError, and queues none, when one of them could never run."""
        if not self._is_busy:  # no steps count the time until the disk is tried again
            self._cache.retry_disk()
        for request in requests:
            self._scheduler.check(request)
        for request in requests:
            try:
                self._scheduler.add(request)
            except RequestError as error:
                self._answers.refuse(request, error)

    def abort(self, answers: Iterable[tuple[str, int | None]], reason: str = "abort") -> None:
        """See `EngineClient.abort`."""
        for request_id, index in answers:
            self._answers.abort(request_id, index, reason)
            self._is_drained = False

    def reset_prefix_cache(self) -> None:
        """Forgets the pages of all prefixes, in every tier; what runs keeps its own."""
        self._cache.reset()
        self._is_drained = False

    def import_pages(self, path: str, cache_salt: str | None, start: int) -> tuple[int, int]:
        """See `CacheImport.take_in`."""
        from distkv.engine.cache_import import CacheImport  # imports zarr

        self._finish_running()
        self._is_drained = False
        if self._import is None:
            self._import = CacheImport(self.info, self._cache, self._runner)
        return self._import.take_in(path, cache_salt, start)

    def close(
        self, progress: Callable[[int], None] = lambda num_unsaved: None, save_timeout: float | None = None
    ) -> None:
        """Ends what runs, saves what later processes may use, and frees memory and files.

        Args:
            progress: is told how many pages are to be saved, and every second how many are left.
            save_timeout: seconds that this may take for it; None for those that the engine was started with.
        """
        try:
            save = FinalSave(self._cache, progress, self.info.save_timeout if save_timeout is None else save_timeout)
            self.abort([(one.request.request_id, None) for one in self._scheduler.running + self._scheduler.waiting])
            self._finish_running()
            save.run(self._runner)
        except Exception as error:
            log.warning(
                "the cache was not saved to its end, %d KV pages are missing: %s", self._cache.num_unsaved, error
            )
        finally:
            if self._import is not None:
                self._import.close()
            try:
                self._runner.close()
            finally:
                self._close()
                self._observer.closed()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: requests, or pages to be saved."""
        return self._is_busy or bool(self._answers.outputs) or not self._is_drained

    def rest(self) -> float | None:
        """See `EngineClient.rest`: the catalogue may still have to be written."""
        return self._runner.rest()

    def check_ready(self) -> None:
        """See `EngineClient.check_ready`: what ends this engine ends it for good."""

    @property
    def _is_busy(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running or self._running or self._unread)

    def stats(self) -> EngineStats:
        """The state between two steps."""
        return engine_stats(
            self.info,
            self._scheduler,
            self._runner,
            peak_pages=self._preparation.peak_pages,
            num_recomputed=self._repairs.num_pages,
            num_preemptions=self._num_preemptions,
        )

    @property
    def meter(self) -> RequestMeter:
        """What counts its requests."""
        return self._scheduler.meter

    def integrity_check(self) -> None:
        """Raises AssertionError when pages were lost or are held twice; meant for when nothing runs."""
        if not self._is_busy:
            while self._runner.drain():
                pass
        self._cache.integrity_check()
        if not self._is_busy:
            self._copies.forget_ended()
            assert self._cache.num_pages == 0
            assert not self._cache.awaited

    # --- the stages of a step ---

    def _schedule(self) -> Scheduled:
        """The sequences of the next step, with the number of tokens each runs. The choice looks at the running step as
        if it had ended, so that it does not depend on whether the device has room for both. Nothing is chosen ahead
        where it depends on more than tokens, see `_waits_for`."""
        if self._cache.lost or (self._running is not None and self._waits_for(self._running)):
            return []
        self._copies.forget_ended()
        held = self._copies.num_held([] if self._running is None else self._running.copies)
        return self._scheduler.schedule(held, self._faults.next())

    def _waits_for(self, step: Step) -> bool:
        """Whether what comes behind a step depends on more than its end."""
        speculator = self._scheduler.speculator
        return step.forks or self._faults.is_on or (speculator is not None and speculator.awaits(step))

    def _prepare(self, scheduled: Scheduled) -> Step | None:
        """The next step; None when nothing is scheduled, when the running step must end first, when a page was lost, or
        when there is no room."""
        step = None
        if scheduled and self._make_step_room(scheduled):
            step = self._preparation.prepare(scheduled, self._running or self._unread)
        self._observer.prepared(step)
        return step

    def _make_step_room(self, scheduled: Scheduled) -> bool:
        """Frees the device pages of a step, as far as transfers of the running one let it."""
        try:
            return self._preparation.make_step_room(scheduled, waits=self._running is None)
        except CapacityError as error:
            if self._running is None:  # the disk took less than it was to take
                self._fail(self._scheduler.newest.request, error)
            return False

    def _start(self, step: Step) -> None:
        """Gives the ranks a step; they run it while this goes on."""
        step.start()
        self._running = step
        self._is_drained = False
        self._observer.started(step)

    def _complete(self, step: Step, following: Step | None) -> bool:
        """Waits for the report on the running step and books it, but for its tokens. False when that leaves another
        state than `following` was prepared for, which is undone then: the step has failed, or a page was lost."""
        result = step.wait()
        self._observer.reported(step)
        self._running = None
        try:
            damaged = set() if result.report is None else self._runner.take_in(result.report)
        except BaseException:
            if following is not None:
                following.undo()
            step.undo(reported=True)
            raise
        went_well = result.error is None and not damaged and not self._cache.lost
        if following is not None and not went_well:
            following.undo()
        if result.error is not None:
            step.undo(reported=result.report is not None)
            self._blame(step, result.error)
        else:
            for request, failure in self._repairs.lose(damaged, step.sequences):
                self._fail(request, failure)
            if result.report is not None:
                self._scheduler.load_choice.note(step.work, result.report)
            step.commit(result, damaged)
            self._faults.clear(step.sequences)
            self._unread = step
        self._observer.completed(step)
        return went_well

    def _finish_running(self) -> None:
        """Has no step run, and the device done with the last one. What it sampled is returned by the next `step`."""
        if self._failure is not None:
            raise self._failure
        if self._running is not None:
            self._complete(self._running, None)
        self._read()

    def _read(self) -> None:
        """Waits for the tokens of the completed step, unless they are known, and adds them to the answers."""
        if self._unread is None:
            return
        try:
            scores, answers = self._unread.read_scores(), self._unread.read()
        except Exception as error:
            self._failure = error
            if not self._survives:
                raise
            self._failure = DistKVError(
                f"the device failed, and what it was at is lost ({type(error).__name__}: {error}); "
                "make a new LLM in a new process"
            )
            raise self._failure from error
        if self._scheduler.speculator is not None:
            self._scheduler.speculator.take(self._unread)
        self._unread = None
        self.meter.tick()
        for sequence, scored in scores:
            self._answers.score(sequence, scored)
        for sequence, tokens in answers:
            self._answers.extend(sequence, tokens)

    # --- what cannot go on, and what goes on without a step ---

    def _blame(self, step: Step, error: Exception) -> None:
        """Ends the sequence that made a step raise; with several in the step, they are run one by one first."""
        if not self._survives or isinstance(error, DistKVError):
            raise error
        alive = sum(not sequence.finished for sequence in step.sequences)
        log.error("a step of %d sequence(s) failed", alive, exc_info=error)
        at_fault = self._faults.narrow(step.sequences)
        if at_fault is not None:
            reason = DistKVError(f"the step of this request failed: {type(error).__name__}: {error}")
            self._fail(at_fault.request, reason)

    def _do_without_step(self) -> None:
        """Computes a lost page again, ends a request that will never have room, or goes on with saving."""
        if self._cache.lost:
            self._repair()
        elif self._scheduler.running:
            self._preempt()
        elif self._scheduler.waiting:
            self._refuse()
        else:
            self._is_drained = not self._runner.drain()

    def _repair(self) -> None:
        """Computes a lost page again."""
        try:
            self._preparation.make_room(1, waits=True)
        except CapacityError as error:
            self._fail(self._scheduler.newest.request, error)
            return
        if self._cache.lost:
            for request, failure in self._repairs.repair(self._scheduler.running):
                self._fail(request, failure)

    def _preempt(self) -> None:
        """Makes room when all running sequences wait for pages of each other: one that needs more than was expected
        gives its own up. Ends the newest request when none does: the disk took less than it was to take."""
        sequence = self._scheduler.preempt()
        if sequence is None:
            error = CapacityError(
                f"the tiers hold {self._cache.num_pages} KV pages of {self._cache.capacity} and have no room for "
                f"another{self._cache.disk_refusal}; raise host_kv_bytes or disk_kv_bytes, or make room on the disk"
            )
            self._fail(self._scheduler.newest.request, error)
            return
        self._num_preemptions += 1
        self._faults.forget(sequence)
        self._runner.end_tables([sequence.number])
        log.warning(
            "the KV cache is full, since requests without max_tokens are longer than expected: request %s gives its "
            "room up and reads its %d tokens again later. Raise device_kv_bytes, host_kv_bytes or disk_kv_bytes, or "
            "set max_tokens",
            sequence.request.request_id, len(sequence.token_ids),
        )  # fmt: skip

    def _refuse(self) -> None:
        """Ends a waiting request for which there will never be room: the disk took less than it was to take."""
        request = self._scheduler.refuse()
        assert request is not None
        try:
            self._scheduler.check(request)
        except CapacityError as error:
            self._fail(request, error)
            return
        self._fail(request, CapacityError(f"there was no room for the request{self._cache.disk_refusal}; add it again"))

    def _fail(self, request: EngineRequest, error: DistKVError) -> None:
        """Ends a request that cannot go on."""
        self._answers.fail(request, error)
        self._is_drained = False
