"""The pages of one sequence, in logical order."""

from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.paging import pages_for


class PageTable:
    """Maps the tokens of a sequence to pages; pages are taken as tokens arrive, none ahead of them.

    Several steps may be prepared before the first of them has ended: `append` prepares one, `commit` ends it.
    """

    def __init__(
        self, cache: TieredCache, page_size: int, tenant: bytes | None = None, part_size: int | None = None
    ):  # fmt: skip
        """
        Args:
            tenant: whose the pages are, see `Shares`.
            part_size: tokens that are rounded together when the last of them has come, where pages have a codec; those
                of a page unless several ranks share them out.
        """
        self._cache = cache
        self.tenant = tenant
        self.page_size = page_size
        self.part_size = part_size or page_size
        self.pages: list[Page] = []
        self.num_tokens = 0  # with those of steps that have not ended
        self.num_committed = 0

    def begin(self, pages: list[Page]) -> None:
        """Starts the sequence with the full pages of a known prefix."""
        assert not self.pages
        for page in pages:
            self._cache.share(page, self.tenant)
        self.pages = list(pages)
        self.num_tokens = self.num_committed = len(pages) * self.page_size

    def missing(self, num_tokens: int) -> int:
        """Pages that `append` would take."""
        return pages_for(max(0, self.num_tokens + num_tokens - len(self.pages) * self.page_size), self.page_size)

    def append(self, num_tokens: int) -> list[Page]:
        """Makes room for `num_tokens` more tokens; returns the pages that it took, with the old content of their slots.

        Raises CapacityError when the device lacks free slots; see `TieredCache.reserve`.
        """
        first = len(self.pages)
        for index in range(first, first + self.missing(num_tokens)):
            before = self.pages[-1] if self.pages else None
            self.pages.append(self._cache.allocate(index, before, self.tenant))
        self.num_tokens += num_tokens
        return self.pages[first:]

    def rewind(self, num_tokens: int) -> None:
        """Takes back the last `append` that was not taken back, with the pages that it took."""
        self.num_tokens -= num_tokens
        while len(self.pages) > pages_for(self.num_tokens, self.page_size):
            self._cache.release(self.pages.pop())

    def cut(self, num_pages: int) -> None:
        """Takes back all tokens but those of the first pages, so many of which are full. No step may be under way."""
        self.rewind(self.num_tokens - num_pages * self.page_size)
        self.num_committed = self.num_tokens

    def commit(self, num_tokens: int, keys: list[PageKey] | None = None) -> None:
        """Takes note that the next `num_tokens` tokens are in their pages; those that are full never change again.

        Args:
            keys: of the first full pages of the sequence, by which others may find them. Those behind them, or all with
                None, are kept to this sequence.
        """
        first = self.num_committed // self.page_size
        self.num_committed += num_tokens
        for index in range(first, self.num_committed // self.page_size):
            self._cache.fill(self.pages[index], keys[index] if keys is not None and index < len(keys) else None)

    def fork(self) -> tuple["PageTable", tuple[Page, Page] | None]:
        """A second table over the same tokens. Full pages are shared; a partly filled last page is the new table's own.

        Returns the table and the `(source, target)` pages that must be copied before either sequence goes on, or None.
        Raises CapacityError as `append` does.
        """
        assert self.num_tokens == self.num_committed
        other = PageTable(self._cache, self.page_size, self.tenant, self.part_size)
        full = self.num_tokens // self.page_size
        copy = None
        if full < len(self.pages):
            copy = self.pages[full], self._cache.allocate(full, tenant=self.tenant)
        for page in self.pages[:full]:
            self._cache.share(page)
        other.pages = self.pages[:full] + ([copy[1]] if copy else [])
        other.num_tokens = other.num_committed = self.num_tokens
        return other, copy

    def fork_first(self, num_pages: int) -> "PageTable":
        """A second table over the tokens of so many full pages, which are shared."""
        other = PageTable(self._cache, self.page_size, self.tenant, self.part_size)
        other.begin(self.pages[:num_pages])
        return other

    def release(self) -> None:
        """Gives every page back, the last one first, so that a prefix outlives what follows it."""
        for page in reversed(self.pages):
            self._cache.release(page)
        self.pages, self.num_tokens, self.num_committed = [], 0, 0
