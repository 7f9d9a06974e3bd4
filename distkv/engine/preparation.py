"""Makes the next step, mostly while the one before runs."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain

from distkv.engine.fork_copies import ForkCopies
from distkv.engine.scheduler import Scheduler
from distkv.engine.sequence import Scheduled, Sequence
from distkv.engine.step import Step
from distkv.engine.step_runner import StepRunner


class Preparation:
    """Frees device pages for a step, gives its tokens theirs, and has the cache move pages ahead of need."""

    def __init__(self, scheduler: Scheduler, copies: ForkCopies, runner: StepRunner):
        self.peak_pages = 0  # that sequences have held at a time
        self._scheduler, self._copies, self._runner = scheduler, copies, runner
        self._cache = scheduler.cache

    def make_step_room(self, scheduled: Scheduled, waits: bool) -> bool:
        """Frees the device pages of a step. False when `make_room` says so or a page was lost; raises as it does."""
        needed: Counter[bytes] = Counter()
        for one, count in scheduled:
            needed[one.table.tenant or b""] += one.table.missing(count) + _num_fork_pages(one, count)
        return self.make_room(needed.total(), waits, needed) and not self._cache.lost

    def prepare(self, scheduled: Scheduled, before: Step | None) -> Step:
        """A step that may be started, for which there is room.

        Args:
            before: the step before it, while its tokens are not read.
        """
        # as long as the step's tokens have no pages
        forks = any(_num_fork_pages(one, count) for one, count in scheduled)
        step = Step(scheduled, before, self._cache, self._copies, self._runner)
        self._move_pages(step, promotes=not forks)
        step.fix_pages()
        self._scheduler.cold_budget.note_relocated(len(step.relocated))
        return step

    def make_room(self, num_pages: int, waits: bool, coming: Mapping[bytes, int] | None = None) -> bool:
        """Frees device pages. False when transfers must end first and it does not wait for them. Raises CapacityError
        when there is no room for what the pages hold.

        Args:
            coming: how many of them each tenant is to get.
        """
        while not self._cache.reserve(num_pages, coming):
            if not waits:
                return False
            self._runner.wait_for(self._cache.awaited)
        return True

    def _move_pages(self, step: Step, promotes: bool) -> None:
        """Has the cache spill, save and fetch pages ahead of need. `promotes` lets free device pages be filled, which
        forks would need. Those of a sequence that begins are fetched from its second step on: the first one streams
        them, and its token comes sooner where nothing else reads the disk meanwhile."""
        scheduler, cache = self._scheduler, self._cache
        cache.balance()
        if promotes and cache.may_promote and scheduler.cold_budget.is_steady:
            begin = step.beginning
            running = (one for one in scheduler.running if not one.is_parked and one not in begin)
            wanted = (one for one in running if cache.may_come_up(one.table.tenant))
            cache.promote(chain.from_iterable(one.by_importance() for one in wanted))
        if promotes and scheduler.waiting:
            cache.promote(scheduler.expected_pages())
        self.peak_pages = max(self.peak_pages, cache.num_pages)


def _num_fork_pages(sequence: Sequence, count: int) -> int:
    """Pages that the other answers of its request need, if they begin with the step."""
    return sequence.num_fork_pages(count) if sequence.is_prefilling else 0
