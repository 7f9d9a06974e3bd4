"""The engine loop: schedules a step, has the ranks run it, draws tokens, ends what is done."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from distkv.errors import CapacityError, DistKVError, StoreError
from distkv.messages import EngineInfo, EngineRequest, EngineStats, RequestFailed, StepOutput, TokenOutput
from distkv.scheduler import Scheduler
from distkv.sequence import Sequence
from distkv.storage.page_size import pages_for
from distkv.storage.random_pages import page_seed
from distkv.storage.tier import Tier
from distkv.storage.tiered_cache import Page
from distkv.workers.report import Report
from distkv.workers.sampler import SampleRow, TokenLogprobs, sample, uniform_draw
from distkv.workers.step_plan import SequencePlan, StepPlan

if TYPE_CHECKING:
    from distkv.storage.catalogue import Catalogue

log = logging.getLogger(__name__)

MAX_REPAIRS = 3  # times that a page is computed again before its requests fail

Execute = Callable[[StepPlan], tuple[Tensor | None, Report]]
"""Runs a step plan on all ranks; returns what rank 0's `Rank.execute` does, and the report of all."""


class Engine:
    """Works on tokens alone; an `EngineClient`."""

    def __init__(self, info: EngineInfo, execute: Execute, close: Callable[[], None] = lambda: None):
        """`close` is called when the engine is closed."""
        self.info = info
        self._execute = execute
        self._close = close
        self._scheduler = Scheduler(info)
        self._cache = self._scheduler.cache
        self._catalogue = _open_catalogue(info)
        # pages that the next plan has to copy (source, target), held until it has run
        self._copies: list[tuple[Page, Page]] = []
        self._peak_pages = 0
        self._moved: Counter[str] = Counter()
        self._pages_recomputed = 0
        self._damage = ""  # what could not be read back last, and why

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests; raises CapacityError, and queues none, when one of them could never run."""
        try:
            for request in requests:
                self._scheduler.check(request)
        except CapacityError:
            if not self.has_work:  # no step will come that counts the time until the disk is tried again
                self._cache.retry_disk()
            raise
        for request in requests:
            self._scheduler.add(request)

    def abort(self, answers: Iterable[tuple[str, int | None]]) -> None:
        """Ends answers `(request id, index)` at once, with index None all of a request; ended ones are passed over."""
        for request_id, index in answers:
            self._scheduler.abort(request_id, index)

    def close(self) -> None:
        """Ends transfers and frees memory and files."""
        try:
            if self._catalogue is not None:
                self._catalogue.close()
        finally:
            self._close()

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    def stats(self) -> EngineStats:
        """The state between two steps."""
        return EngineStats(
            pages_in_use=self._cache.num_pages,
            peak_pages_in_use=self._peak_pages,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            device_pages=self._cache.slots[Tier.DEVICE].num_used,
            host_pages=self._cache.slots[Tier.HOST].num_used,
            disk_pages=self._cache.slots[Tier.DISK].num_used,
            moved=dict(self._moved),
            pages_recomputed=self._pages_recomputed,
        )

    def integrity_check(self) -> None:
        """Raises AssertionError when pages were lost or are held twice; meant for when nothing runs."""
        while not self.has_work and (pending := self._cache.awaited):
            self._run(self._moving_plan(pending))
        self._cache.integrity_check()
        if not self.has_work:
            self._forget_copies()
            assert self._cache.num_pages == 0
            assert all(slots.num_used == 0 for slots in self._cache.slots)

    def step(self) -> list[StepOutput]:
        """Runs one step and returns the tokens it drew, none while prompts are being read, and the requests that cannot
        go on."""
        self._forget_copies()
        try:
            if self._cache.lost:
                return self._repair()
            scheduled = self._scheduler.schedule(sum(source.references == 1 for source, _ in self._copies))
            forks = sum(sequence.num_fork_pages(count) for sequence, count in scheduled)
            self._make_room(forks + sum(sequence.table.missing(count) for sequence, count in scheduled))
            if self._cache.lost:  # a transfer that was waited for has failed
                return []
        except CapacityError as error:  # the disk took less than it was to take
            return [self._fail(self._scheduler.running[-1].request, error)]
        return self._step(scheduled, promote=not forks) if scheduled else self._refuse()

    def _step(self, scheduled: list[tuple[Sequence, int]], promote: bool) -> list[StepOutput]:
        """`promote` lets free device pages be filled, which forks would need."""
        starts = [(sequence, sequence.table.num_tokens) for sequence, _ in scheduled]
        try:
            plan = self._plan(scheduled, promote)
            self._peak_pages = max(self._peak_pages, self._cache.num_pages)
            logits, unread = self._run(plan)
            ready = [sequence for sequence, _ in scheduled if not sequence.num_pending]
            rows = [row for number, one in enumerate(ready) for row in _sample_rows(one, number)]
            drawn = sample(logits, rows) if logits is not None else []
        except BaseException:
            for sequence, start in starts:  # so that those that are not aborted can take the step again
                sequence.table.rewind(sequence.table.num_tokens - start)
            raise
        self._release_copies()
        spoilt = {sequence for sequence, _ in scheduled if not unread.isdisjoint(sequence.table.pages)}
        for sequence, count in scheduled:
            if sequence in spoilt:
                sequence.table.rewind(count)
            else:
                sequence.table.commit(count)
        tokens = iter(drawn)
        outputs: list[StepOutput] = []
        for sequence in ready:
            mine = [next(tokens) for _ in range(_num_draws(sequence))]
            if sequence not in spoilt:
                outputs += self._answer(sequence, mine)
        return outputs

    def _plan(self, scheduled: list[tuple[Sequence, int]], promote: bool) -> StepPlan:
        """Gives the step's tokens their pages and writes the step down for the ranks."""
        clear: list[int] = []
        random_pages = []
        appended = []
        for sequence, count in scheduled:
            start, is_random = sequence.table.num_tokens, bool(sequence.num_random)
            fresh = sequence.table.append(count)
            if is_random:
                random_pages += [(page.location, _page_seed(sequence, page)) for page in fresh]
                continue
            clear += [page.location for page in fresh]
            appended.append((sequence, start, count))
        self._cache.balance()
        if promote and self._cache.has_cold:
            self._cache.promote(page for sequence in self._scheduler.running for page in sequence.by_importance())
        # where pages lie is settled now
        parts = []
        for sequence, start, count in appended:
            num_logits = 0 if sequence.num_pending else 1
            parts.append(_sequence_plan(sequence, start, count, num_logits))
        transfers, await_ids = self._cache.take_transfers()
        copies = [(source.location, target.location) for source, target in self._copies]
        return StepPlan(parts, copies, clear, transfers, await_ids, random_pages)

    def _run(self, plan: StepPlan) -> tuple[Tensor | None, set[Page]]:
        """Has the ranks run a plan and takes in their report; returns the logits and the pages that could not be
        read."""
        try:
            self._update_catalogue({})
            logits, report = self._execute(plan)
        except BaseException:
            self._cache.put_back(plan.transfers, plan.await_ids)
            raise
        self._moved.update(report.moved)
        for _, reason in [*report.failed, *report.bad_reads]:
            log.warning("%s", reason)
            self._damage = reason
        unread = self._cache.apply(report.done, report.failed, [slot for slot, _ in report.bad_reads])
        self._update_catalogue(report.checksums)
        return logits, unread

    def _moving_plan(self, await_ids: list[int]) -> StepPlan:
        """A plan that runs nothing but transfers, and waits for some."""
        transfers, others = self._cache.take_transfers()
        return StepPlan([], [], [], transfers, others + await_ids)

    def _make_room(self, num_pages: int) -> None:
        """Frees device pages; raises CapacityError when there is no room for what they hold."""
        while not self._cache.reserve(num_pages):
            self._run(self._moving_plan(self._cache.awaited))

    def _forget_copies(self) -> None:
        """Drops copies for answers that have ended since."""
        for pair in [pair for pair in self._copies if pair[1].references == 1]:
            self._copies.remove(pair)
            for page in pair:
                self._cache.release(page)

    def _release_copies(self) -> None:
        copies, self._copies = self._copies, []
        for pair in copies:
            for page in pair:
                self._cache.release(page)

    def _update_catalogue(self, checksums: dict[int, bytes]) -> None:
        """Takes vacated disk slots out before they can be written again, and puts new pages in."""
        vacated, written = self._cache.vacated, self._cache.written
        if self._catalogue is not None and (vacated or written):
            from distkv.storage.catalogue import Entry

            # TEMPORARY, until the engine knows the keys of pages: entries that no later process can use
            added = [
                Entry(slot, os.urandom(16), b"", b"", checksums[id], time.time(), 0)
                for slot, id in written.items()
                if id in checksums
            ]
            try:
                self._catalogue.update(vacated, added)
            except StoreError as error:
                log.warning("%s; this run goes on without a catalogue", error)
                self._catalogue.discard()
                self._catalogue = None
        vacated.clear()
        written.clear()

    def _repair(self) -> list[StepOutput]:
        """Computes a lost page again from its tokens, the first one first, since later ones follow from it."""
        self._make_room(1)
        page = min(self._cache.lost, key=lambda page: page.index)
        owners = [one for one in self._scheduler.running if page in one.table.pages[page.index : page.index + 1]]
        if page.repairs == MAX_REPAIRS:
            error = StoreError(
                f"KV page {page.index} was lost {page.repairs + 1} times, the last time because {self._damage}"
            )
            requests = {one.request.request_id: one.request for one in owners}
            return [self._fail(request, error) for request in requests.values()]
        self._cache.restore(page)
        owner, size = owners[0], self.info.page_size
        slot = page.location
        if page.index * size < owner.num_random_in_all:
            parts, random_pages = [], [(slot, _page_seed(owner, page))]
        else:
            parts, random_pages = [_sequence_plan(owner, page.index * size, size, 0)], []
        transfers, await_ids = self._cache.take_transfers()
        try:
            _, unread = self._run(StepPlan(parts, [], [slot], transfers, await_ids, random_pages))
        except BaseException:
            self._cache.forget(page)
            raise
        if unread:
            self._cache.forget(page)
        else:
            self._cache.fill(page)
            self._pages_recomputed += 1
        return []

    def _fail(self, request: EngineRequest, error: DistKVError) -> RequestFailed:
        """Ends a request that cannot go on."""
        log.error("request %s failed: %s", request.request_id, error)
        self._scheduler.abort(request.request_id)
        return RequestFailed(request.request_id, type(error).__name__, str(error))

    def _refuse(self) -> list[StepOutput]:
        """Ends a waiting request for which there will never be room: the disk took less than it was to take."""
        request = self._scheduler.refuse()
        if request is None:
            return []
        try:
            self._scheduler.check(request)
        except CapacityError as error:
            return [self._fail(request, error)]
        raise AssertionError(f"request {request.request_id} fits and is not admitted")

    def _answer(self, sequence: Sequence, drawn: list[tuple[int, TokenLogprobs | None]]) -> list[StepOutput]:
        """Adds the drawn tokens to the answers of a sequence: one to an answer being written, one to each answer of a
        request whose prompt has just been read."""
        answers = [sequence]
        if len(drawn) > 1:
            for fork, copy in self._scheduler.fork(sequence):
                answers.append(fork)
                if copy is not None:
                    self._copies.append(copy)
                    for page in copy:
                        self._cache.share(page)
        return [self._extend(answer, token, logprobs) for answer, (token, logprobs) in zip(answers, drawn, strict=True)]

    def _extend(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """Adds a drawn token to its answer and ends the answer if it is to end here."""
        sequence.token_ids.append(token)
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
        return TokenOutput(request.request_id, sequence.index, token, logprobs, finish_reason, stop_reason)


def _open_catalogue(info: EngineInfo) -> "Catalogue | None":
    if info.cache_dir is None:
        return None
    from distkv.storage.catalogue import Catalogue  # imports zarr

    return Catalogue(Path(info.cache_dir))


def _sequence_plan(sequence: Sequence, start: int, count: int, num_logits: int) -> SequencePlan:
    end = start + count
    num_pages = pages_for(end, sequence.table.page_size)
    places = [page.location for page in sequence.table.pages[:num_pages]]
    return SequencePlan(sequence.token_ids[start:end], start, places, sequence.prompt_len, num_logits)


def _page_seed(sequence: Sequence, page: Page) -> int:
    """Of a page of random keys and values."""
    assert sequence.request.random_kv_seed is not None
    return page_seed(sequence.request.random_kv_seed, page.index)


def _num_draws(sequence: Sequence) -> int:
    """Tokens drawn from one row of logits: one for each answer of a request whose prompt has just been read."""
    return sequence.request.params.n if sequence.in_prompt else 1


def _sample_rows(sequence: Sequence, logits_row: int) -> list[SampleRow]:
    """The draws from one row of logits."""
    params = sequence.request.params
    position = sequence.num_output_tokens
    return [
        SampleRow(
            logits_row=logits_row,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            num_logprobs=params.logprobs,
            uniform=uniform_draw(sequence.request.seed, index, position) if params.temperature > 0 else 0.0,
            prompt_token_ids=sequence.request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
        )
        for index in (range(params.n) if sequence.in_prompt else [sequence.index])
    ]
