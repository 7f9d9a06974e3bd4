"""Pages that nobody holds and a later request may ask for: which of them has been left alone longest, by tier."""

from collections.abc import Iterator
from itertools import combinations

from sortedcontainers import SortedDict

from distkv.storage.ledger.page import Page
from distkv.storage.tier import ALL_TIERS, Tier


class IdlePages:
    """Whole copies of idle pages in each tier, least recently used first.

    A page is never older than one that follows it in a sequence, so that prefixes are given up from their end.
    """

    def __init__(self) -> None:
        self._by_tier = tuple(SortedDict() for _ in ALL_TIERS)  # stamp -> page
        self._by_pair = {(a, b): SortedDict() for a, b in combinations(ALL_TIERS, 2)}  # with a copy in both
        self._clock = 0

    def touch(self, page: Page) -> None:
        """Makes a page the most recently used; it must not be entered."""
        self._clock += 1
        page.stamp = self._clock

    def add(self, page: Page, tier: Tier) -> None:
        """Enters the copy in a tier."""
        self._by_tier[tier][page.stamp] = page
        for pair, pages in self._by_pair.items():
            if tier in pair and all(page.stamp in self._by_tier[one] for one in pair):
                pages[page.stamp] = page

    def discard(self, page: Page, tier: Tier) -> None:
        """Takes the copy in a tier out, if it is entered."""
        self._by_tier[tier].pop(page.stamp, None)
        for pair, pages in self._by_pair.items():
            if tier in pair:
                pages.pop(page.stamp, None)

    def count(self, tier: Tier) -> int:
        return len(self._by_tier[tier])

    def pages(self, tier: Tier) -> Iterator[Page]:
        """All with a copy in a tier, least recently used first; none may come or go meanwhile."""
        return iter(self._by_tier[tier].values())

    def oldest(self, tier: Tier, saved_in: tuple[Tier, ...] = (), unread: bool = True) -> Page | None:
        """The least recently used with a copy in the tier.

        Args:
            saved_in: it must have a copy in one of these other tiers too.
            unread: no transfer may read the copy.
        """
        lists = [self._by_pair[min(tier, other), max(tier, other)] for other in saved_in] or [self._by_tier[tier]]
        firsts = (
            next((page for page in pages.values() if not (unread and page.reading[tier])), None) for pages in lists
        )
        return min((page for page in firsts if page is not None), key=lambda page: page.stamp, default=None)
