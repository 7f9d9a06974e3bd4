"""What an engine saves at its end, so that later processes find it."""

import logging
import time
from collections.abc import Callable

from distkv.engine.step_runner import StepRunner
from distkv.storage.ledger.tiered_cache import TieredCache

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0  # after which it is told how it gets on


class FinalSave:
    """Has the pages that are not on disk yet written there, within a time.

    Those of the requests that ran last come first, and of each of them the first page before the next: a page is of no
    use to a later process without all that come before it. So whatever is on disk when the time is over can be used.
    """

    def __init__(self, cache: TieredCache, progress: Callable[[int], None], timeout: float | None):
        """The time begins.

        Args:
            progress: is told how many pages are to be saved, and every second how many are left.
            timeout: in seconds; None for as long as it takes.
        """
        self._cache, self._progress, self._timeout = cache, progress, timeout
        self._begun = time.monotonic()
        self._num_unsaved = cache.num_unsaved
        progress(self._num_unsaved)

    def run(self, runner: StepRunner) -> None:
        """Goes on until nothing is left to be saved, the disk takes no more, or the time is over. To be called when no
        request runs any more."""
        self._cache.retry_disk()  # what it refused it may take by now, and there is no later time
        told, is_late = self._begun, False
        while not is_late and runner.drain():
            now = time.monotonic()
            is_late = self._timeout is not None and now - self._begun >= self._timeout
            if now - told >= PROGRESS_SECONDS:
                self._progress(self._cache.num_unsaved)
                told = now
        self._tell(is_late)

    def _tell(self, is_late: bool) -> None:
        left, seconds = self._cache.num_unsaved, time.monotonic() - self._begun
        num_saved = max(0, self._num_unsaved - left)
        if left:
            reason = " (the disk tier is full of pages that were used later)"
            if is_late:
                reason = f" (the {self._timeout:g} s of save_timeout were over, in which {num_saved} were)"
            log.warning("%d KV pages were not saved%s", left, self._cache.disk_refusal or reason)
        elif num_saved:
            log.info("%d KV pages were saved in %.1f s", num_saved, seconds)
