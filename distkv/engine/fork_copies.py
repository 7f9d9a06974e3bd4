"""Pages that must be copied before an answer that was forked off another can go on."""

from collections.abc import Iterable

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache

PageCopy = tuple[Page, Page]
"""Source and target."""


class ForkCopies:
    """The copies that the next step has to make; their pages are held until that step has ended."""

    def __init__(self, cache: TieredCache):
        self._cache = cache
        self._pending: list[PageCopy] = []

    def add(self, copy: PageCopy) -> None:
        """Has the next step make a copy."""
        for page in copy:
            self._cache.share(page)
        self._pending.append(copy)

    def take(self) -> list[PageCopy]:
        """The copies that the step being prepared has to make; `put_back` or `release` must follow."""
        taken, self._pending = self._pending, []
        return taken

    def put_back(self, copies: list[PageCopy]) -> None:
        """Undoes `take`."""
        self._pending += copies

    def release(self, copies: Iterable[PageCopy]) -> None:
        """Lets go of the pages of copies that have been made."""
        for copy in copies:
            for page in copy:
                self._cache.release(page)

    def forget_ended(self) -> None:
        """Drops copies for answers that have ended since."""
        ended = [copy for copy in self._pending if copy[1].references == 1]
        self._pending = [copy for copy in self._pending if copy not in ended]
        self.release(ended)

    def num_held(self, taken: list[PageCopy]) -> int:
        """Pages that are held for these copies alone, or for those that a running step has taken."""
        return sum(page.references == 1 for copy in [*self._pending, *taken] for page in copy)
