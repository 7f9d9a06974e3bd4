"""The engine loop: settles a step, has the ranks run it, draws tokens, ends what is done.

While a step runs, the next one is settled. It is launched as soon as the tokens that the first draws are known, and
only then is it looked at which answers they end; so an answer that ends by its tokens is run for one token too many,
which is dropped.
"""

import logging
from collections.abc import Callable, Iterable
from itertools import chain

from distkv.errors import CapacityError, DistKVError, StoreError
from distkv.flight import Draw, Flight
from distkv.messages import EngineInfo, EngineRequest, EngineStats, RequestFailed, StepOutput, TokenOutput
from distkv.scheduler import Scheduler
from distkv.sequence import Chosen, Sequence
from distkv.step_runner import Execute, StepRunner
from distkv.storage.page import Page
from distkv.storage.tier import Tier
from distkv.workers.sampler import TokenLogprobs
from distkv.workers.step_plan import StepPlan

log = logging.getLogger(__name__)

MAX_REPAIRS = 3  # times that a page is computed again before its requests fail


class Engine:
    """Works on tokens alone; an `EngineClient`. Not for several threads at a time; steps run on a thread of its own."""

    def __init__(
        self, info: EngineInfo, execute: Execute, close: Callable[[], None] = lambda: None, survives: bool = True
    ):
        """
        Args:
            close: called when the engine is closed.
            survives: a step that raises leaves the ranks fit for others, so that the sequence at fault can be found.
        """
        self.info = info
        self._close = close
        self._survives = survives
        self._scheduler = Scheduler(info)
        self._cache = self._scheduler.cache
        self._runner = StepRunner(info, execute, self._cache)
        self._flight: Flight | None = None
        self._untold: list[StepOutput] = []  # failures, above all: to be told with the next outputs
        # pages that the next plan has to copy (source, target), held until it has run
        self._copies: list[tuple[Page, Page]] = []
        self._suspects: list[Sequence] = []  # of a step that raised, to be run one by one
        self._is_settled = True  # nothing moves and nothing is to be saved
        self._peak_pages = 0
        self._pages_recomputed = 0

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
            self.abort([(one.request.request_id, None) for one in self._scheduler.running + self._scheduler.waiting])
            if self._flight is not None:
                self._land(self._flight, [], None)
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
        return bool(self._scheduler.waiting or self._scheduler.running or self._flight)

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
            moved=dict(self._runner.moved),
            pages_recomputed=self._pages_recomputed,
        )

    def integrity_check(self) -> None:
        """Raises AssertionError when pages were lost or are held twice; meant for when nothing runs."""
        if not self._is_busy:
            while self._runner.settle():
                pass
        self._cache.integrity_check()
        if not self._is_busy:
            self._forget_copies()
            assert self._cache.num_pages == 0
            assert not self._cache.awaited

    def step(self) -> list[StepOutput]:
        """Goes on by a step; returns tokens that were drawn, if any have come, and the requests that cannot go on."""
        flight = self._flight
        chosen = [] if flight is not None and (flight.forks or self._suspects) else self._choose()
        following = self._settle_step(chosen) if chosen else None
        outputs: list[StepOutput] = []
        if flight is not None:
            outputs = self._land(flight, chosen, following)
        elif following is not None:
            self._launch(following)
        elif not chosen:
            self._do_without_step()
        untold, self._untold = self._untold, []
        return outputs + untold

    # --- a step's way ---

    def _choose(self) -> Chosen:
        """The sequences of the next step, with the number of tokens each runs. The choice looks at the step under way
        as if it had ended, so that it does not depend on whether the device has room for both."""
        if self._cache.lost:
            return []
        self._forget_copies()
        copies = self._copies + (self._flight.copies if self._flight is not None else [])
        held = sum(page.references == 1 for pair in copies for page in pair)
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
        clear: list[int] = []
        random_pages = []
        parts = []
        drawing = []
        for sequence, count in scheduled:
            table = sequence.table
            start = table.num_tokens
            fresh = table.append(count)
            if start < sequence.num_random_in_all:
                random_pages += [(page.location, sequence.page_seed(page)) for page in fresh]
                continue
            clear += [page.location for page in fresh]
            draws = start + count == len(sequence.token_ids) + sequence.num_drawing
            if draws:
                drawing.append(sequence)
                sequence.num_drawing += 1
            parts.append((sequence, sequence.plan(start, count, int(draws))))
        self._cache.balance()
        if promote and self._cache.may_promote and self._scheduler.cold_budget.is_settled:
            running = (one for one in self._scheduler.running if not one.is_parked)
            self._cache.promote(chain.from_iterable(one.by_importance() for one in running))
        if promote and self._scheduler.waiting:
            self._cache.promote(self._scheduler.expected_pages())
        self._peak_pages = max(self._peak_pages, self._cache.num_pages)
        # where pages lie is settled now
        transfers, await_ids = self._cache.take_transfers()
        moved = self._cache.take_moved()
        self._scheduler.cold_budget.note_moved(len(moved))
        ended, self._runner.ended = self._runner.ended, []
        copies, self._copies = self._copies, []
        plan = StepPlan(
            [part for _, part in parts],
            [(source.location, target.location) for source, target in copies],
            clear, transfers, await_ids, random_pages, [(page.id, page.location) for page in moved], ended,
        )  # fmt: skip
        return Flight(plan, scheduled, parts, moved, drawing, copies)

    def _launch(self, flight: Flight) -> None:
        try:
            flight.fill_in()
            flight.landing = self._runner.start(flight.plan, flight.rows())
        except BaseException:
            self._undo(flight)
            raise
        self._flight = flight
        self._is_settled = False

    def _land(self, flight: Flight, chosen: Chosen, following: Flight | None) -> list[StepOutput]:
        """Waits for a step, launches the one that follows, and adds the drawn tokens to their answers.

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
            return []
        self._release(flight.copies)
        drawn = self._commit(flight, landing.drawn, unread)
        try:
            if following is None and chosen and not unread and not self._cache.lost:
                following = self._settle_step(chosen)
            if following is not None:
                self._launch(following)
        except BaseException:
            self._untold += self._answer(flight, drawn)
            raise
        return self._answer(flight, drawn)

    def _commit(self, flight: Flight, tokens: list[Draw], unread: set[Page]) -> list[list[Draw]]:
        """Books a step that has ended; returns what was drawn for each of `flight.drawing`, nothing for those that have
        ended meanwhile, or take the step again since a page could not be read."""
        spoilt = set()
        for sequence, count in flight.scheduled:
            if sequence.finished:
                continue
            if unread and not unread.isdisjoint(sequence.table.pages):
                spoilt.add(sequence)
                sequence.rewind(count)
            else:
                sequence.commit(count)
        rest = iter(tokens)
        drawn = []
        for sequence in flight.drawing:
            mine = [next(rest) for _ in range(sequence.num_answers)]
            sequence.num_drawing -= 1
            if sequence.finished or sequence in spoilt:
                mine = []
            elif sequence.is_drawn_once:  # the step that follows may wait for the token
                sequence.token_ids.append(mine[0][0])
            drawn.append(mine)
        if self._suspects and flight.scheduled[0][0] is self._suspects[0]:
            del self._suspects[0]  # it was not at fault
        return drawn

    def _undo(self, flight: Flight, ran: bool = False) -> None:
        """Takes a step back that came to nothing; `ran` says that the ranks have reported on its transfers."""
        for sequence, count in flight.scheduled:
            if not sequence.finished:
                sequence.rewind(count)
        for sequence, part in flight.parts:
            sequence.num_told = min(sequence.num_told, part.first_page)
        for sequence in flight.drawing:
            sequence.num_drawing -= 1
        self._copies += flight.copies
        if not ran:
            self._cache.put_back(flight.plan.transfers, flight.plan.await_ids, flight.moved)
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
        """Computes a lost page again from its tokens, the first one first, since later ones follow from it."""
        try:
            self._make_room(1)
        except CapacityError as error:
            self._fail(self._scheduler.running[-1].request, error)
            return
        if not self._cache.lost:
            return
        page = min(self._cache.lost, key=lambda page: page.index)
        owners = [one for one in self._scheduler.running if page in one.table.pages[page.index : page.index + 1]]
        if page.repairs == MAX_REPAIRS:
            failure = StoreError(
                f"KV page {page.index} was lost {page.repairs + 1} times, the last time because {self._runner.damage}"
            )
            for request in {one.request.request_id: one.request for one in owners}.values():
                self._fail(request, failure)
            return
        self._cache.restore(page)
        owner, size = owners[0], self.info.page_size
        slot = page.location
        if page.index * size < owner.num_random_in_all:
            parts, random_pages = [], [(slot, owner.page_seed(page))]
        else:
            parts, random_pages = [owner.plan(page.index * size, size, 0)], []
        transfers, await_ids = self._cache.take_transfers()
        moved = self._cache.take_moved()
        places = [(page.id, page.location) for page in moved]
        try:
            unread = self._runner.run(StepPlan(parts, [], [slot], transfers, await_ids, random_pages, places))
        except BaseException:
            self._cache.put_back([], [], moved)
            owner.num_told = 0
            self._cache.forget(page)
            raise
        if unread:
            self._cache.forget(page)
        else:
            self._cache.fill(page)
            self._pages_recomputed += 1

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

    # --- copies for forks ---

    def _forget_copies(self) -> None:
        """Drops copies for answers that have ended since."""
        ended = [pair for pair in self._copies if pair[1].references == 1]
        self._copies = [pair for pair in self._copies if pair not in ended]
        self._release(ended)

    def _release(self, copies: list[tuple[Page, Page]]) -> None:
        for pair in copies:
            for page in pair:
                self._cache.release(page)

    # --- answers ---

    def _answer(self, flight: Flight, drawn: list[list[Draw]]) -> list[StepOutput]:
        """Adds the drawn tokens to their answers."""
        outputs: list[StepOutput] = []
        for sequence, mine in zip(flight.drawing, drawn, strict=True):
            if sequence.finished or not mine:
                continue
            answers = [sequence]
            if not sequence.is_drawn_once:
                for fork, copy in self._scheduler.fork(sequence):
                    answers.append(fork)
                    if copy is not None:
                        self._copies.append(copy)
                        for page in copy:
                            self._cache.share(page)
                for answer, (token, _) in zip(answers, mine, strict=True):
                    answer.token_ids.append(token)
            outputs += [
                self._extend(answer, token, logprobs) for answer, (token, logprobs) in zip(answers, mine, strict=True)
            ]
        return outputs

    def _extend(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """Tells of the newest token of an answer and ends the answer if it is to end here."""
        request = sequence.request
        finish_reason = stop_reason = None
        if not request.params.ignore_eos and token in self.info.eos_token_ids:
            finish_reason = "stop"
        elif token in (request.params.stop_token_ids or ()):
            finish_reason, stop_reason = "stop", token
        elif sequence.num_output_tokens >= request.max_tokens:
            finish_reason = "length"
        if finish_reason:
            self._scheduler.finish(sequence)
            self._end([sequence])
        cached = sequence.num_cached if sequence.num_output_tokens == 1 else (0, 0, 0)
        return TokenOutput(request.request_id, sequence.index, token, logprobs, finish_reason, stop_reason, cached)

    def _end(self, sequences: list[Sequence]) -> None:
        """Notes what has ended."""
        self._runner.ended += [sequence.number for sequence in sequences]
        self._is_settled = False
