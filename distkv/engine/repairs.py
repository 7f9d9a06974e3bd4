"""Pages that no tier can give back are computed again from their tokens."""

from distkv.engine.page_places import tell_places
from distkv.engine.protocol import EngineRequest
from distkv.engine.sequence import Sequence
from distkv.engine.step_runner import StepRunner
from distkv.errors import StoreError
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.step_plan import StepPlan

MAX_REPAIRS = 3  # times that a page is computed again before its requests fail


class Repairs:
    """Runs plans of its own, while no step is under way and the tokens of all steps are known."""

    def __init__(self, cache: TieredCache, runner: StepRunner, page_size: int):
        self.num_pages = 0  # computed again so far
        self._cache = cache
        self._runner = runner
        self._page_size = page_size

    def repair(self, running: list[Sequence]) -> list[tuple[EngineRequest, StoreError]]:
        """Computes one of the pages that the cache counts as lost, of which there must be one, and for which it must
        have room on the device: the first one in its sequences, since later ones follow from it. Where a policy of
        attention observes its tokens in all of them, they read it again with all behind it.

        Returns the requests that cannot go on, since their page was lost too often.
        """
        page = min(self._cache.lost, key=lambda page: page.index)
        owners = [one for one in running if page in one.table.pages[page.index : page.index + 1]]
        able = [one for one in owners if not one.is_observed(page.index)]
        if owners and not able:
            failures = self.lose({page}, owners)
            for one in owners:
                one.read_again()
            return failures
        if page.repairs == MAX_REPAIRS:
            requests = {one.request.request_id: one.request for one in owners}
            return [(request, self._failure(page)) for request in requests.values()]
        self._cache.restore(page)
        owner, size = able[0], self._page_size
        slot = page.location
        if owner.synthetic.covers(page.index * size):
            parts, synthetic_pages = [], owner.synthetic.fills([page])
        else:
            parts, synthetic_pages = [owner.plan(page.index * size, size, 0)], []
        plan = StepPlan(parts, [], [slot], synthetic_pages=synthetic_pages)
        relocated = tell_places(plan, self._cache)
        try:
            damaged = self._runner.run(plan)
        except BaseException:
            self._cache.put_back([], [], relocated)
            owner.num_sent = 0
            self._cache.forget(page)
            raise
        if damaged:
            self._cache.forget(page)
        else:
            self._cache.fill(page)
            self.num_pages += 1
            for one in owners:
                one.cached_tiers[page.index : page.index + 1] = [None] * (page.index < len(one.cached_tiers))
        return []

    def lose(self, pages: set[Page], owners: list[Sequence]) -> list[tuple[EngineRequest, StoreError]]:
        """Takes note of pages that were lost, as far as a policy of attention observes their tokens: the owners of such
        a page let go of it and read it again, so that nobody would count how often that happens.

        Returns what `repair` does.
        """
        failures: dict[str, tuple[EngineRequest, StoreError]] = {}
        for one in owners if pages else []:
            for page in one.table.pages:
                if page in pages and one.is_observed(page.index):
                    one.losses[page.index] += 1
                    self.num_pages += 1
                    if one.losses[page.index] > MAX_REPAIRS:
                        failures[one.request.request_id] = one.request, self._failure(page)
        return list(failures.values())

    def _failure(self, page: Page) -> StoreError:
        return StoreError(
            f"KV page {page.index} was lost {MAX_REPAIRS + 1} times, the last time because {self._runner.damage}"
        )
