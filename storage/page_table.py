"""The pages of one sequence, in logical order."""

from distkv.storage.page_size import pages_for
from distkv.storage.tiered_cache import Page, TieredCache


class PageTable:
    """Maps the tokens of a sequence to pages; pages are taken as tokens arrive, none ahead of them."""

    def __init__(self, cache: TieredCache, page_size: int):
        self._cache = cache
        self.page_size = page_size
        self.pages: list[Page] = []
        self.num_tokens = 0

    @property
    def num_unfilled(self) -> int:
        """Pages that are not full, so that they must stay on the device."""
        return len(self.pages) - self.num_tokens // self.page_size

    def missing(self, num_tokens: int) -> int:
        """Pages that `append` would take."""
        return max(0, pages_for(self.num_tokens + num_tokens, self.page_size) - len(self.pages))

    def append(self, num_tokens: int) -> list[Page]:
        """Makes room for `num_tokens` more tokens; returns their pages that nothing was written to yet.

        Raises CapacityError when the device lacks free slots; see `TieredCache.reserve`.
        """
        for _ in range(self.missing(num_tokens)):
            self.pages.append(self._cache.allocate(len(self.pages), self.pages[-1] if self.pages else None))
        first = self.num_tokens // self.page_size
        self.num_tokens += num_tokens
        return [page for page in self.pages[first:] if page.fresh]

    def rewind(self, num_tokens: int) -> None:
        """Takes back the last `append`, whose step has failed; its pages are kept for the next try."""
        self.num_tokens -= num_tokens

    def commit(self, num_tokens: int) -> None:
        """Tells that the tokens of the last `append` are in their pages; those that are full never change again."""
        first, last = (self.num_tokens - num_tokens) // self.page_size, self.num_tokens // self.page_size
        for page in self.pages[first:]:
            page.fresh = False
        for page in self.pages[first:last]:
            self._cache.fill(page)

    def fork(self) -> tuple["PageTable", tuple[Page, Page] | None]:
        """A second table over the same tokens. Full pages are shared; a partly filled last page is the new table's own.

        Returns the table and the `(source, target)` pages that must be copied before either sequence goes on, or None.
        Raises CapacityError as `append` does.
        """
        other = PageTable(self._cache, self.page_size)
        full = self.num_tokens // self.page_size
        copy = None
        if full < len(self.pages):
            copy = self.pages[full], self._cache.allocate(full)
            copy[1].fresh = False
        for page in self.pages[:full]:
            self._cache.share(page)
        other.pages = self.pages[:full] + ([copy[1]] if copy else [])
        other.num_tokens = self.num_tokens
        return other, copy

    def release(self) -> None:
        """Gives every page back."""
        for page in self.pages:
            self._cache.release(page)
        self.pages, self.num_tokens = [], 0
