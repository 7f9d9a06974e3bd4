"""Has the ranks run plans, and keeps the books of the cache by what they report."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor as Thread
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from distkv.engine.protocol import EngineInfo
from distkv.errors import StoreError
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.meter import Measures, Span
from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.group.executor import Executor, StepResult
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.sampling.sample_row import SampleRow

if TYPE_CHECKING:
    from distkv.engine.catalogue_writer import CatalogueWriter
    from distkv.storage.disk.catalogue import Entry

log = logging.getLogger(__name__)

Result = TypeVar("Result")

WAITING_SECONDS = 1.0  # after which it is told that something takes long


class StepRunner:
    """Plans run one after another, on a thread of their own."""

    def __init__(
        self,
        info: EngineInfo,
        executor: Executor,
        cache: TieredCache,
        thread: Thread | None = None,
        measured: Callable[[list[Span]], None] = lambda spans: None,
        waiting: Callable[[], None] = lambda: None,
    ):
        """Warms up, and takes in what earlier processes left on disk; raises StoreError or ConfigError when the
        catalogue there cannot be used.

        Args:
            thread: runs one call after another; one is made unless it is given.
            measured: see `StepObserver.measured`.
            waiting: called every second while what the ranks run takes long.
        """
        self.bytes_moved: Counter[str] = Counter()  # by route
        self.measures = Measures()  # of all ranks since the start, without spans
        self.damage = ""  # what could not be read back last, and why
        self._last_warning = ""  # since the disk took a page
        self.executor = executor
        self._cache, self._measured, self._waiting = cache, measured, waiting
        self._ended: list[int] = []  # tables that the ranks may forget with the next plan
        self._thread = ThreadPoolExecutor(1, "distkv-step") if thread is None else thread
        self._catalogue_writer: CatalogueWriter | None = None
        try:
            self._thread.submit(executor.warm_up).result()
            self._catalogue_writer = _open_catalogue_writer(info, cache)
            if self._catalogue_writer is not None:
                self._catalogue_writer.adopt(self._report_of)
        except BaseException:
            self.close()
            raise

    def start(self, plan: StepPlan, rows: list[SampleRow]) -> "Future[StepResult]":
        """Has the ranks run a plan, and sample tokens from its logits. The plan, and rows, may refer to the tokens of
        the plan that was started before; `run` may come between."""
        self._update_catalogue({})
        return self._thread.submit(self.executor.run, plan, rows)

    def wait(self, started: Future[Result]) -> Result:
        """What came of it. A wait that was interrupted may be taken up again."""
        while not started.done():
            try:
                return started.result(WAITING_SECONDS)
            except TimeoutError:
                self._waiting()
        return started.result()

    def run(self, plan: StepPlan) -> set[Page]:
        """Waits for a plan that samples nothing, while no other runs; returns what `take_in` does."""
        try:
            self._update_catalogue({})
            report = self._report_of(plan)
        except BaseException:
            self._cache.put_back(plan.transfers, plan.await_ids)
            self.put_back_ended(plan.ended)
            raise
        return self.take_in(report)

    def take_in_pages(self, entries: list["Entry"], fill: Callable[["Entry"], None]) -> None:
        """Takes in pages that come from elsewhere, while no plan runs.

        Args:
            entries: for free slots, each page behind the one before it in its sequence.
            fill: writes a page's files.

        Raises what `fill` does, and StoreError when a rank does not find a page, having taken in none.
        """
        assert self._catalogue_writer is not None
        self._update_catalogue({})  # of the pages that lay there before
        for entry in entries:
            fill(entry)
        report = self._report_of(StepPlan([], [], [], added={entry.slot: entry.crc32c for entry in entries}))
        self.take_in(report)  # which tells of other transfers, too
        if report.missing:
            raise StoreError(
                f"{len(report.missing)} of {len(entries)} pages are not where all ranks look for them: nodes with "
                "disks of their own cannot import; use a cache_dir that all nodes see"
            )
        self._catalogue_writer.add(entries)

    def take_in(self, report: Report) -> set[Page]:
        """Books what the ranks report; returns the held pages that the step could not read."""
        self.bytes_moved.update(report.bytes_moved)
        spans, report.measures.spans = report.measures.spans, []
        if spans:
            self._measured(spans)
        self.measures.add(report.measures)
        if report.checksums:
            self._last_warning = ""
        for _, reason in [*report.failed, *report.bad_reads]:
            self.damage = reason
            if reason != self._last_warning:  # a disk that is full says the same of every page
                log.warning("%s", reason)
                self._last_warning = reason
        damaged = self._cache.apply(report.done, report.failed, [slot for slot, _ in report.bad_reads])
        self._update_catalogue(report.checksums)
        return damaged

    def draft(self, requests: list[DraftRequest]) -> list[list[int]]:
        """See `Executor.draft`; while no plan runs."""
        return self.wait(self._thread.submit(self.executor.draft, requests))

    def wait_for(self, ids: Iterable[int]) -> None:
        """Runs a plan of nothing but transfers that waits for some."""
        self.run(self._transfer_plan(ids))

    def drain(self) -> bool:
        """Goes on with what moves by itself, write-through and pages that are saved for later processes, while no plan
        runs; False when all is done."""
        self._cache.balance()
        awaited = self._cache.awaited
        plan = self._transfer_plan(awaited)
        if not (plan.transfers or plan.await_ids or plan.ended):
            self._update_catalogue({})
            return False
        self.run(plan)
        if awaited and self._cache.awaited[:1] == awaited[:1]:
            log.error("the ranks do not know transfer %d; what moves by itself is left as it is", awaited[0])
            return False
        return True

    def rest(self) -> float | None:
        """Writes the catalogue if that could not be done before, while no plan runs. Returns the seconds after which it
        is to be called once more, None for never."""
        self._update_catalogue({})
        return None if self._catalogue_writer is None else self._catalogue_writer.pause

    def end_tables(self, numbers: Iterable[int]) -> None:
        """Has the next plan tell the ranks which page tables nobody needs any more."""
        self._ended += numbers

    def take_ended(self) -> list[int]:
        """What a plan has to say of ended tables; `put_back_ended` must follow if it does not reach the ranks."""
        ended, self._ended = self._ended, []
        return ended

    def put_back_ended(self, numbers: list[int]) -> None:
        """Undoes `take_ended`; ranks pass over what they know."""
        self._ended += numbers

    def close(self) -> None:
        """Ends the thread and closes the catalogue."""
        self._thread.shutdown()
        if self._catalogue_writer is not None:
            self._catalogue_writer.close()

    def _transfer_plan(self, await_ids: Iterable[int]) -> StepPlan:
        transfers, others = self._cache.take_transfers()
        return StepPlan([], [], [], transfers, [*others, *await_ids], ended=self.take_ended())

    def _report_of(self, plan: StepPlan) -> Report:
        result = self.wait(self._thread.submit(self.executor.run, plan, []))
        if result.report is None:
            assert result.error is not None
            raise result.error
        return result.report

    def _update_catalogue(self, checksums: dict[int, bytes]) -> None:
        journal = self._cache.journal
        if self._catalogue_writer is not None:
            self._catalogue_writer.update(journal.changes, checksums)
        journal.take()  # last, so that an update which is interrupted is made again


def _open_catalogue_writer(info: EngineInfo, cache: TieredCache) -> "CatalogueWriter | None":
    if info.cache_dir is None or not info.enable_prefix_caching:
        return None
    from distkv.engine.catalogue_writer import CatalogueWriter  # imports zarr

    return CatalogueWriter(Path(info.cache_dir), cache)
