"""What a plan tells ranks of where pages lie."""

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.step_plan import StepPlan


def tell_places(plan: StepPlan, cache: TieredCache) -> list[Page]:
    """Adds to a plan what the cache has to tell: transfers, pages in other places, and new ones. Returns the pages of
    which the plan sends where they lie."""
    plan.transfers, plan.await_ids = cache.take_transfers()
    relocated = cache.take_relocated()
    plan.relocated = [(page.id, page.location) for page in relocated]
    plan.host_pages = cache.hosts_of(relocated)
    plan.new_pages = [page.id for page in cache.take_new(relocated)]
    return relocated
