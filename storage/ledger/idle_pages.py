"""Pages that nobody holds and a later request may ask for: which of them has been left alone longest, by tier."""

from collections.abc import Iterator
from itertools import combinations

from sortedcontainers import SortedDict

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.shares import Shares
from distkv.storage.tier import ALL_TIERS, Tier


class IdlePages:
    """Whole copies of idle pages in each tier, least recently used first, and of tenants with more than their share
    before those of others.

    A page is never older than one that follows it in a sequence, so that prefixes are given up from their end.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._all = _ByUse()
        self._of_tenants: dict[bytes, _ByUse] = {}  # the same of each, where there are shares
        self._clock = 0

    def touch(self, page: Page) -> None:
        """Makes a page the most recently used; it must not be entered."""
        self._clock += 1
        page.stamp = self._clock

    def add(self, page: Page, tier: Tier) -> None:
        """Enters the copy in a tier."""
        self._all.add(page, tier)
        if self._shares.is_on and page.tenant is not None:
            if page.tenant not in self._of_tenants:
                self._of_tenants[page.tenant] = _ByUse()
            self._of_tenants[page.tenant].add(page, tier)

    def discard(self, page: Page, tier: Tier) -> None:
        """Takes the copy in a tier out, if it is entered."""
        self._all.discard(page, tier)
        if page.tenant in self._of_tenants:
            own = self._of_tenants[page.tenant]
            own.discard(page, tier)
            if own.is_empty:
                del self._of_tenants[page.tenant]

    def count(self, tier: Tier) -> int:
        return self._all.count(tier)

    def pages(self, tier: Tier) -> Iterator[Page]:
        """All with a copy in a tier, least recently used first; none may come or go meanwhile."""
        return self._all.pages(tier)

    def pages_of(self, tenant: bytes, tier: Tier) -> Iterator[Page]:
        """The same of a tenant, where there are shares."""
        own = self._of_tenants.get(tenant)
        return iter(()) if own is None else own.pages(tier)

    def oldest(self, tier: Tier, saved_in: tuple[Tier, ...] = (), unread: bool = True) -> Page | None:
        """The first to go with a copy in the tier.

        Args:
            saved_in: it must have a copy in one of these other tiers too.
            unread: no transfer may read the copy.
        """
        page = self.surplus(tier, saved_in, unread)
        return self._all.oldest(tier, saved_in, unread) if page is None else page

    def surplus(self, tier: Tier, saved_in: tuple[Tier, ...] = (), unread: bool = True) -> Page | None:
        """The same among those of tenants with more than their share."""
        for tenant in self._shares.over(tier):
            if tenant in self._of_tenants:
                page = self._of_tenants[tenant].oldest(tier, saved_in, unread)
                if page is not None:
                    return page
        return None


class _ByUse:
    """Copies in each tier, and those in two at once, by the last use of their pages."""

    def __init__(self) -> None:
        self._by_tier = tuple(SortedDict() for _ in ALL_TIERS)  # stamp -> page
        self._by_pair = {(a, b): SortedDict() for a, b in combinations(ALL_TIERS, 2)}  # with a copy in both

    @property
    def is_empty(self) -> bool:
        return not any(self._by_tier)

    def add(self, page: Page, tier: Tier) -> None:
        self._by_tier[tier][page.stamp] = page
        for pair, pages in self._by_pair.items():
            if tier in pair and all(page.stamp in self._by_tier[one] for one in pair):
                pages[page.stamp] = page

    def discard(self, page: Page, tier: Tier) -> None:
        self._by_tier[tier].pop(page.stamp, None)
        for pair, pages in self._by_pair.items():
            if tier in pair:
                pages.pop(page.stamp, None)

    def count(self, tier: Tier) -> int:
        return len(self._by_tier[tier])

    def pages(self, tier: Tier) -> Iterator[Page]:
        return iter(self._by_tier[tier].values())

    def oldest(self, tier: Tier, saved_in: tuple[Tier, ...], unread: bool) -> Page | None:
        lists = [self._by_pair[min(tier, other), max(tier, other)] for other in saved_in] or [self._by_tier[tier]]
        firsts = (
            next((page for page in pages.values() if not (unread and page.reading[tier])), None) for pages in lists
        )
        return min((page for page in firsts if page is not None), key=lambda page: page.stamp, default=None)
