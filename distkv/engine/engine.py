"""The engine loop: settles a step, has the ranks run it, draws tokens, ends what is done.

While a step runs, the next one is settled. It is launched as soon as the first has landed: when the ranks have reported
on it, whatever their devices are still at. The tokens that the first draws may not be known then; the next step refers
to them. They are read while it runs, and only then is it looked at which answers they end; so an answer that ends by
its tokens is run for one token too many, which is dropped.
"""

import logging
from collections.abc import Callable, Iterable
from itertools import chain, islice

from distkv.engine.fork_copies import ForkCopies
from distkv.engine.protocol import EngineInfo, EngineRequest, EngineStats, RequestFailed, StepOutput, TokenOutput
from distkv.engine.repairs import Repairs
from distkv.engine.scheduler import Scheduler
from distkv.engine.sequence import Chosen, Sequence
from distkv.engine.step import Flight
from distkv.engine.step_runner import Execute, StepRunner
from distkv.errors import CapacityError, DistKVError
from distkv.storage.ledger.page import Page
from distkv.storage.tier import Tier
from distkv.workers.sampling.sampled_token import SampledToken, TokenLogprobs
from distkv.workers.sampling.sampler import SampledTokens

log = logging.getLogger(__name__)


class Engine:
    """Works on tokens alone; an `EngineClient`. Not for several threads at a time; steps run on a thread of its own."""

    def __init__(
        self,
        info: EngineInfo,
        execute: Execute,
        close: Callable[[], None] = lambda: None,
        survives: bool = True,
        warm_up: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            close: called when the engine is closed.
            survives: a step that raises leaves the ranks fit for others, so that the sequence at fault can be found.
            warm_up: does what would delay the first steps, on their thread and before anything else.
        """
        self.info = info
        self._close = close
        self._survives = survives
        self._scheduler = Scheduler(info)
        self._cache = self._scheduler.cache
        self._runner = StepRunner(info, execute, self._cache, warm_up)
        self._repairs = Repairs(self._cache, self._runner, info.page_size)
        self._copies = ForkCopies(self._cache)
        self._flight: Flight | None = None  # launched
        self._landed: Flight | None = None  # the one before, whose draws are not read yet
        self._failure: Exception | None = None  # of the device; nothing goes on after it
        self._untold: list[StepOutput] = []  # failures: to be told with the next outputs
        self._suspects: list[Sequence] = []  # of a step that raised, to be run one by one
        self._is_settled = True  # nothing moves and nothing is to be saved
        self._peak_pages = 0

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests; raises CapacityError, and queues none, when one of them could never run."""
        if not self._is_busy:  # no steps count the time until the disk is tried again
            self._cache.retry_disk()
        for request in requests:
            self._scheduler.check(request)
        for request in requests:
            self._scheduler.add(request)

    def abort(self, answers: Iterable[tuple[str, int | None]]) -> None:
        """Ends answers `(request id, index)` at once, with index None all of a request; ended ones are passed over."""
        for request_id, index in answers:
            self._end(self._scheduler.abort(request_id, index))

    def reset_prefix_cache(self) -> None:
        """Forgets the pages of all prefixes, in every tier; what runs keeps its own."""
        self._cache.reset()
        self._is_settled = False

    def close(self) -> None:
        """Ends what runs, saves what later processes may use, and frees memory and files."""
        try:
            if self._failure is not None:
                raise self._failure
            self.abort([(one.request.request_id, None) for one in self._scheduler.running + self._scheduler.waiting])
            if self._flight is not None:
                self._land(self._flight, [], None)
            self._read_sampled()  # the device has done with it, then
            while self._runner.settle():
                pass
        except Exception as error:
            log.warning("the cache was not saved to its end: %s", error)
        finally:
            try:
                self._runner.close()
            finally:
                self._close()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: requests, or pages to be saved."""
        return self._is_busy or bool(self._untold) or not self._is_settled

    @property
    def _is_busy(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running or self._flight or self._landed)

    def stats(self) -> EngineStats:
        """The state between two steps."""
        return EngineStats(
            pages_in_use=self._cache.num_pages,
            peak_pages_in_use=self._peak_pages,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_parked=sum(sequence.is_parked for sequence in self._scheduler.running),
            idle_pages=self._cache.num_idle,
            device_pages=self._cache.slots[Tier.DEVICE].num_used,
            host_pages=self._cache.slots[Tier.HOST].num_used,
            disk_pages=self._cache.slots[Tier.DISK].num_used,
            bytes_moved=dict(self._runner.bytes_moved),
            pages_recomputed=self._repairs.num_pages,
        )

    def integrity_check(self) -> None:
        """Raises AssertionError when pages were lost or are held twice; meant for when nothing runs."""
        if not self._is_busy:
            while self._runner.settle():
                pass
        self._cache.integrity_check()
        if not self._is_busy:
            self._copies.forget_ended()
            assert self._cache.num_pages == 0
            assert not self._cache.awaited

    def step(self) -> list[StepOutput]:
        """Goes on by a step; returns tokens that were drawn, if any have come, and the requests that cannot go on.

        Raises DistKVError when the device fails; nothing goes on after that.
        """
        if self._failure is not None:
            raise self._failure
        self._untold += self._read_sampled()  # which an exception has left over
        flight = self._flight
        chosen = [] if flight is not None and (flight.forks or self._suspects) else self._choose()
        following = self._settle_step(chosen) if chosen else None
        if flight is not None:
            self._land(flight, chosen, following)
        elif following is not None:
            self._launch(following)
        elif not chosen:
            self._do_without_step()
        outputs = self._untold + self._read_sampled()
        self._untold = []
        return outputs

    # --- a step's way ---

    def _choose(self) -> Chosen:
        """The sequences of the next step, with the number of tokens each runs. The choice looks at the step under way
        as if it had ended, so that it does not depend on whether the device has room for both."""
        if self._cache.lost:
            return []
        self._copies.forget_ended()
        held = self._copies.num_held(self._flight.copies if self._flight is not None else [])
        return self._scheduler.schedule(held, self._next_suspect())

    def _settle_step(self, chosen: Chosen) -> Flight | None:
        """Makes room for a step and writes it down for the ranks; None when the step under way must end first, when a
        page was lost, or when there is no room."""
        forks = sum(one.num_fork_pages(count) for one, count in chosen if one.in_prompt)
        needed = forks + sum(one.table.missing(count) for one, count in chosen)
        try:
            if not self._make_room(needed) or self._cache.lost:
                return None
        except CapacityError as error:
            if self._flight is None:  # the disk took less than it was to take
                self._fail(self._scheduler.running[-1].request, error)
            return None
        return self._write_down(chosen, promote=not forks)

    def _make_room(self, num_pages: int) -> bool:
        """Frees device pages, waiting for transfers unless a step is under way; then False says that they must end
        first. Raises CapacityError when there is no room for what the pages hold."""
        while not self._cache.reserve(num_pages):
            if self._flight is not None:
                return False
            self._runner.wait_for(self._cache.awaited)
        return True

    def _write_down(self, scheduled: Chosen, promote: bool) -> Flight:
        """Gives the step's tokens their pages and writes the step down for the ranks. `promote` lets free device pages
        be filled, which forks would need."""
        flight = Flight.board(scheduled, self._flight or self._landed)
        self._cache.balance()
        if promote and self._cache.may_promote and self._scheduler.cold_budget.is_settled:
            running = (one for one in self._scheduler.running if not one.is_parked)
            self._cache.promote(chain.from_iterable(one.by_importance() for one in running))
        if promote and self._scheduler.waiting:
            self._cache.promote(self._scheduler.expected_pages())
        self._peak_pages = max(self._peak_pages, self._cache.num_pages)
        # where pages lie is settled now
        plan = flight.plan
        plan.transfers, plan.await_ids = self._cache.take_transfers()
        flight.relocated = self._cache.take_relocated()
        plan.relocated = [(page.id, page.location) for page in flight.relocated]
        self._scheduler.cold_budget.note_relocated(len(flight.relocated))
        plan.ended, self._runner.ended = self._runner.ended, []
        flight.copies = self._copies.take()
        plan.copies = [(source.location, target.location) for source, target in flight.copies]
        return flight

    def _launch(self, flight: Flight) -> None:
        try:
            flight.landing = self._runner.start(flight.plan, flight.rows())
        except BaseException:
            self._undo(flight)
            raise
        self._flight = flight
        self._is_settled = False

    def _land(self, flight: Flight, chosen: Chosen, following: Flight | None) -> None:
        """Waits for the report on a step, and launches the one that follows. What the first draws is left to be read.

        Args:
            chosen: what is to follow.
            following: the same if it is settled already, else it had to wait for the device pages of this step.
        """
        assert flight.landing is not None
        try:
            landing = flight.landing.result()
        except BaseException:  # an interrupted wait
            if following is not None:
                self._undo(following)
            raise
        self._flight = None
        try:
            unread = set() if landing.report is None else self._runner.take_in(landing.report)
        except BaseException:
            for step in (following, flight):
                if step is not None:
                    self._undo(step, ran=step is flight)
            raise
        if following is not None and (landing.error is not None or unread or self._cache.lost):
            self._undo(following)
            following = None
        if landing.error is not None:
            self._undo(flight, ran=landing.report is not None)
            self._blame(flight, landing.error)
            return
        self._copies.release(flight.copies)
        self._commit(flight, landing.draws, unread)
        if following is None and chosen and not unread and not self._cache.lost:
            following = self._settle_step(chosen)
        if following is not None:
            self._launch(following)

    def _commit(self, flight: Flight, draws: SampledTokens | None, unread: set[Page]) -> None:
        """Books a step that has landed, but for its draws. Pages that it fills get their names: the tokens in them are
        those that it ran, which are known since the draws of the step before are booked."""
        for sequence, count in flight.scheduled:
            if sequence.finished:
                continue
            if unread and not unread.isdisjoint(sequence.table.pages):
                flight.spoilt.add(sequence)
                sequence.rewind(count)
            else:
                sequence.commit(count)
        if self._suspects and flight.scheduled[0][0] is self._suspects[0]:
            del self._suspects[0]  # it was not at fault
        flight.draws, self._landed = draws, flight

    def _undo(self, flight: Flight, ran: bool = False) -> None:
        """Takes a step back that came to nothing; `ran` says that the ranks have reported on its transfers."""
        for sequence, count in flight.scheduled:
            if not sequence.finished:
                sequence.rewind(count)
        for sequence, part in flight.parts:
            sequence.num_told = min(sequence.num_told, part.first_page)
        for sequence in flight.drawing:
            sequence.num_pending -= 1
        self._copies.put_back(flight.copies)
        if not ran:
            self._cache.put_back(flight.plan.transfers, flight.plan.await_ids, flight.relocated)
            self._runner.ended += flight.plan.ended

    def _blame(self, flight: Flight, error: Exception) -> None:
        """Ends the sequence that made a step raise; with several in the step, they are run one by one first."""
        if not self._survives or isinstance(error, DistKVError):
            raise error
        alive = [sequence for sequence, _ in flight.scheduled if not sequence.finished]
        log.error("a step of %d sequence(s) failed", len(alive), exc_info=error)
        self._suspects = [one for one in self._suspects if one not in alive]
        if len(alive) == 1:
            reason = DistKVError(f"the step of this request failed: {type(error).__name__}: {error}")
            self._fail(alive[0].request, reason)
        else:
            self._suspects = alive + self._suspects

    def _next_suspect(self) -> Sequence | None:
        self._suspects = [sequence for sequence in self._suspects if not sequence.finished]
        return self._suspects[0] if self._suspects else None

    # --- what goes on without a step ---

    def _do_without_step(self) -> None:
        """Computes a lost page again, ends a request that will never have room, or goes on with saving."""
        if self._cache.lost:
            self._repair()
        elif self._scheduler.waiting and not self._scheduler.running:
            self._refuse()
        elif not self._scheduler.running:
            self._is_settled = not self._runner.settle()

    def _repair(self) -> None:
        """Computes a lost page again."""
        try:
            self._make_room(1)
        except CapacityError as error:
            self._fail(self._scheduler.running[-1].request, error)
            return
        if self._cache.lost:
            for request, failure in self._repairs.repair(self._scheduler.running):
                self._fail(request, failure)

    def _fail(self, request: EngineRequest, error: DistKVError) -> None:
        """Ends a request that cannot go on."""
        log.error("request %s failed: %s", request.request_id, error)
        self.abort([(request.request_id, None)])
        self._untold.append(RequestFailed(request.request_id, type(error).__name__, str(error)))

    def _refuse(self) -> None:
        """Ends a waiting request for which there will never be room: the disk took less than it was to take."""
        request = self._scheduler.refuse()
        assert request is not None
        try:
            self._scheduler.check(request)
        except CapacityError as error:
            self._fail(request, error)
            return
        raise AssertionError(f"request {request.request_id} fits and is not admitted")

    # --- answers ---

    def _read_sampled(self) -> list[StepOutput]:
        """Waits for what the step drew that landed last, unless that is known already, and adds it to the answers."""
        flight = self._landed
        if flight is None:
            return []
        try:
            drawn = iter(flight.draws.result() if flight.draws is not None else [])
        except Exception as error:
            if not self._survives:
                self._failure = error
                raise
            self._failure = DistKVError(
                f"the device failed, and what it was at is lost ({type(error).__name__}: {error}); "
                "make a new LLM in a new process"
            )
            raise self._failure from error
        self._landed = None
        outputs: list[StepOutput] = []
        for sequence in flight.drawing:
            mine = list(islice(drawn, sequence.num_answers))
            sequence.num_pending -= 1
            if not sequence.finished and sequence not in flight.spoilt:
                outputs += self._answer(sequence, mine)
        return outputs

    def _answer(self, sequence: Sequence, drawn: list[SampledToken]) -> list[TokenOutput]:
        """Adds what was drawn for a sequence to the answers that it stands for."""
        answers = [sequence]
        if not sequence.is_drawn_once:
            for fork, copy in self._scheduler.fork(sequence):
                answers.append(fork)
                if copy is not None:
                    self._copies.add(copy)
        for answer, (token, _) in zip(answers, drawn, strict=True):
            answer.token_ids.append(token)
        return [self._tell(answer, logprobs) for answer, (_, logprobs) in zip(answers, drawn, strict=True)]

    def _tell(self, sequence: Sequence, logprobs: TokenLogprobs | None) -> TokenOutput:
        """Tells of the newest token of an answer and ends the answer if it is to end here."""
        finish_reason, stop_reason = sequence.ending(self.info.eos_token_ids)
        if finish_reason:
            self._scheduler.finish(sequence)
            self._end([sequence])
        cached = sequence.num_cached if sequence.num_output_tokens == 1 else (0, 0, 0)
        return TokenOutput(
            sequence.request.request_id, sequence.index, sequence.token_ids[-1], logprobs, finish_reason, stop_reason,
            cached,
        )  # fmt: skip

    def _end(self, sequences: list[Sequence]) -> None:
        """Notes what has ended."""
        self._runner.ended += [sequence.number for sequence in sequences]
        self._is_settled = False
