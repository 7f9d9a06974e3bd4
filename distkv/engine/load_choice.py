"""How many of a prompt's known pages are taken up: those that are there sooner than they would be computed again.

Pages on the device cost nothing, nor do those that running sequences hold, since a step streams them once for all.
What a page from the host or from disk costs is measured when a sequence that begins streams it, and what a token costs
by steps that read prompts and stream nothing. A token's cost grows with the tokens that it attends to:
`EngineInfo.attention_cost` says by how much, so that one rate tells what every depth costs.

Loading is what happens unless figures say otherwise: nothing is computed again before both were measured, and only
where that is faster by the factor GAIN. Now and then a few pages are loaded all the same, so that a disk that was slow
for a while, or only when the engine was started, is found to be fast again.

Ranks measure prompts where a page that is computed again has the bits of the first time, see `docs/invariance.md`; with
other kernels, and on a GPU, all known pages are taken up.
"""

import time
from collections.abc import Callable, Iterable

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence_work import SequenceWork
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import DEVICE, DISK, HOST
from distkv.workers.group.report import Report

GAIN = 1.1  # by which computing again must be faster
RETRY_SECONDS = 60.0  # after which some pages are loaded although that seems slower
RETRY_PAGES = 4
STREAMED = {HOST: "host_streamed", DISK: "disk_streamed"}  # routes, see `storage/meter.py`


class LoadChoice:
    """Is told how long steps took, and says for each prompt which of its known pages to take up."""

    def __init__(self, info: EngineInfo, cache: TieredCache, clock: Callable[[], float] = time.monotonic):
        """
        Args:
            clock: seconds.
        """
        self._info, self._cache, self._clock = info, cache, clock
        host, disk = info.cold_page_seconds
        self._load_seconds = {DEVICE: 0.0, HOST: host, DISK: disk}  # of a page
        self._measured_at = dict.fromkeys(self._load_seconds, clock())
        self._token_seconds: float | None = None  # of a token that attends to none; None until it was measured

    def note(self, work: Iterable[SequenceWork], report: Report) -> None:
        """Takes in what a step has told of its work for some sequences. The newest measurement counts half."""
        plans = [(one.sequence, one.plan) for one in work if one.plan is not None]
        begin = [sequence for sequence, plan in plans if plan.start and not plan.first_page]
        for tier, route in STREAMED.items():
            pages = report.bytes_moved.get(route, 0) / self._info.cold_page_bytes
            if pages and any(tier in sequence.cached_tiers for sequence in begin):
                seconds = self._seconds(report, route) / pages
                self._load_seconds[tier] = (self._load_seconds[tier] + seconds) / 2
                self._measured_at[tier] = self._clock()
        computing = self._seconds(report, "compute")
        if computing:
            seconds = computing / sum(self._cost(plan.start, len(plan.token_ids)) for _, plan in plans)
            self._token_seconds = seconds if self._token_seconds is None else (self._token_seconds + seconds) / 2

    def worth_taking(self, found: list[Page]) -> list[Page]:
        """The first of a prompt's known pages: with those behind them computed again, its first token comes soonest.
        All of them where the device has no room to compute the others at once: they would be read from below again."""
        if self._token_seconds is None:
            return found
        size = self._info.page_size
        token = GAIN * self._token_seconds
        if max(self._load_seconds.values()) <= token * self._cost(0, size):  # as nearly always
            return found
        best, least, total = 0, 0.0, 0.0  # how many pages to take, and seconds beyond those of taking none
        for index, page in enumerate(found):
            load = 0.0 if page.references else self._load_seconds[page.tier]
            total += load - token * self._cost(index * size, size)
            if total <= least:
                best, least = index + 1, total
        room = self._cache.slots[DEVICE].num_free + self._cache.num_idle_in(DEVICE)
        if best == len(found) or len(found) - best > room:
            return found
        if self._clock() - self._measured_at[found[best].tier] >= RETRY_SECONDS:
            best = min(best + RETRY_PAGES, len(found))
        return found[:best]

    def _seconds(self, report: Report, kind: str) -> float:
        """What a kind of work has taken on each rank."""
        return report.measures.nanoseconds.get(kind, 0) / 1e9 / self._info.num_ranks

    def _cost(self, start: int, count: int) -> float:
        """Of `count` tokens behind `start` others, in those of a token that attends to none."""
        return count * (1 + self._info.attention_cost * (start + (count + 1) / 2))
