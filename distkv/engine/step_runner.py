"""Has the ranks run plans, and keeps the books of the cache by what they report."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from distkv.engine.protocol import EngineInfo
from distkv.engine.step import Landing
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampler import sample

if TYPE_CHECKING:
    from distkv.engine.catalogue_writer import CatalogueWriter

log = logging.getLogger(__name__)

Execute = Callable[[StepPlan, Tensor | None], tuple[Tensor | None, Report]]
"""Runs a step plan on all ranks, given the tokens that the step before drew if the plan refers to them; returns what
rank 0's `Rank.execute` does, and the report of all."""


class StepRunner:
    """Plans run one after another, on a thread of their own."""

    def __init__(
        self, info: EngineInfo, execute: Execute, cache: TieredCache, warm_up: Callable[[], None] = lambda: None
    ):
        """Warms up, see `Engine`, and takes in what earlier processes left on disk; raises StoreError or ConfigError
        when the catalogue there cannot be used."""
        self.execute = execute
        self.bytes_moved: Counter[str] = Counter()  # bytes by route
        self.damage = ""  # what could not be read back last, and why
        self.ended: list[int] = []  # tables that the ranks may forget with the next plan
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, "distkv-step")
        self._drawn: Tensor | None = None  # by the last step, on the device; for the thread
        self._catalogue_writer: CatalogueWriter | None = None
        try:
            self._thread.submit(warm_up).result()
            self._catalogue_writer = _open_catalogue_writer(info, cache)
            if self._catalogue_writer is not None:
                self._catalogue_writer.adopt(self._report_of)
        except BaseException:
            self.close()
            raise

    def start(self, plan: StepPlan, rows: list[SampleRow]) -> "Future[Landing]":
        """Has the ranks run a plan, and draws tokens from its logits. The plan, and rows, may refer to the draws of the
        plan that was started before; `run` may come between."""
        self._tell_catalogue({})
        return self._thread.submit(self._fly, plan, rows)

    def run(self, plan: StepPlan) -> set[Page]:
        """Waits for a plan that draws nothing, while no other runs; returns what `take_in` does."""
        try:
            self._tell_catalogue({})
            report = self._report_of(plan)
        except BaseException:
            self._cache.put_back(plan.transfers, plan.await_ids)
            self.ended += plan.ended
            raise
        return self.take_in(report)

    def take_in(self, report: Report) -> set[Page]:
        """Books what the ranks report; returns the held pages that the step could not read."""
        self.bytes_moved.update(report.bytes_moved)
        for _, reason in [*report.failed, *report.bad_reads]:
            log.warning("%s", reason)
            self.damage = reason
        unread = self._cache.apply(report.done, report.failed, [slot for slot, _ in report.bad_reads])
        self._tell_catalogue(report.checksums)
        return unread

    def wait_for(self, ids: Iterable[int]) -> None:
        """Runs a plan of nothing but transfers that waits for some."""
        self.run(self._moving_plan(ids))

    def settle(self) -> bool:
        """Goes on with what moves by itself, write-through and pages that are saved for later processes, while no plan
        runs; False when all is done."""
        self._cache.balance()
        awaited = self._cache.awaited
        plan = self._moving_plan(awaited)
        if not (plan.transfers or plan.await_ids or plan.ended):
            self._tell_catalogue({})
            return False
        self.run(plan)
        if awaited and self._cache.awaited[:1] == awaited[:1]:
            log.error("the ranks do not know transfer %d; what moves by itself is left as it is", awaited[0])
            return False
        return True

    def close(self) -> None:
        """Ends the thread and closes the catalogue."""
        self._thread.shutdown()
        if self._catalogue_writer is not None:
            self._catalogue_writer.close()

    def _moving_plan(self, await_ids: Iterable[int]) -> StepPlan:
        transfers, others = self._cache.take_transfers()
        ended, self.ended = self.ended, []
        return StepPlan([], [], [], transfers, [*others, *await_ids], ended=ended)

    def _report_of(self, plan: StepPlan) -> Report:
        landing = self._thread.submit(self._fly, plan, []).result()
        if landing.report is None:
            assert landing.error is not None
            raise landing.error
        return landing.report

    def _fly(self, plan: StepPlan, rows: list[SampleRow]) -> Landing:
        """On the thread. Ends when all is launched; on CUDA the device may not have begun with it yet."""
        report = draws = None
        try:
            drawn = self._drawn if plan.num_sampled else None
            logits, report = self.execute(plan, drawn)
            if rows:
                assert logits is not None
                draws = sample(logits, rows, drawn)
                self._drawn = draws.tokens
            return Landing(report, draws)
        except Exception as error:
            return Landing(report, error=error)

    def _tell_catalogue(self, checksums: dict[int, bytes]) -> None:
        changes = self._cache.journal.take()
        if self._catalogue_writer is not None:
            self._catalogue_writer.update(changes, checksums)


def _open_catalogue_writer(info: EngineInfo, cache: TieredCache) -> "CatalogueWriter | None":
    if info.cache_dir is None or not info.enable_prefix_caching:
        return None
    from distkv.engine.catalogue_writer import CatalogueWriter  # imports zarr

    return CatalogueWriter(Path(info.cache_dir), cache)
