"""The pages of one sequence, in logical order."""

from distkv.storage.page_allocator import PageAllocator
from distkv.storage.page_size import pages_for


class PageTable:
    """Maps the tokens of a sequence to device slots; pages are taken as tokens arrive, none ahead of them."""

    def __init__(self, allocator: PageAllocator, page_size: int):
        self._allocator = allocator
        self._page_size = page_size
        self.slots: list[int] = []
        self.num_tokens = 0

    def append(self, num_tokens: int) -> list[int]:
        """Makes room for `num_tokens` more tokens; returns the slots newly taken, with their old content.

        Raises CapacityError, and changes nothing, when the pool lacks the room.
        """
        total = self.num_tokens + num_tokens
        missing = pages_for(total, self._page_size) - len(self.slots)
        taken = self._allocator.allocate(missing, self.slots[-1] if self.slots else None) if missing > 0 else []
        self.slots += taken
        self.num_tokens = total
        return taken

    def fork(self) -> tuple["PageTable", tuple[int, int] | None]:
        """A second table over the same tokens. Full pages are shared; a partly filled last page is the new table's own.

        Returns the table and the `(source, target)` slots that must be copied before either sequence goes on, or None.
        """
        other = PageTable(self._allocator, self._page_size)
        full = self.num_tokens // self._page_size
        own = self._allocator.allocate(len(self.slots) - full)
        self._allocator.share(self.slots[:full])
        other.slots = self.slots[:full] + own
        other.num_tokens = self.num_tokens
        return other, (self.slots[full], own[0]) if own else None

    def release(self) -> None:
        """Gives every page back."""
        self._allocator.release(self.slots)
        self.slots, self.num_tokens = [], 0
