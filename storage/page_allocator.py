"""Which device slots are free, and how many sequences hold each of the others. Bookkeeping only, no tensor."""

from bisect import bisect_left, insort

from distkv.errors import CapacityError


class PageAllocator:
    """Hands out slots `0 .. num_pages - 1` with reference counts.

    A slot next to the one a sequence ended with is preferred, then the start of the lowest long run of free slots, so
    that the pages of a sequence tend to be neighbours and attention reads them as one view.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages))  # sorted

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def references(self, slot: int) -> int:
        """How many holders the slot has; 0 when it is free."""
        return self._references[slot]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Takes `count` slots with one reference each, beginning right behind slot `after` where that is free.

        Raises CapacityError, and takes none, when fewer are free.
        """
        if count > len(self._free):
            raise CapacityError(
                f"{count} KV pages are needed and {len(self._free)} of {self.num_pages} are free; "
                "raise device_kv_bytes or lower max_num_seqs"
            )
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            first = self._find(taken[-1] if taken else after, wanted)
            length = 1
            while length < wanted and first + length < len(self._free):
                if self._free[first + length] != self._free[first] + length:
                    break
                length += 1
            taken += self._free[first : first + length]
            del self._free[first : first + length]
        for slot in taken:
            self._references[slot] = 1
        return taken

    def share(self, slots: list[int]) -> None:
        """Adds one reference to each slot, all of which are held already."""
        for slot in slots:
            if not self._references[slot]:
                raise ValueError(f"slot {slot} is free and cannot be shared")
            self._references[slot] += 1

    def release(self, slots: list[int]) -> None:
        """Drops one reference from each slot; a slot without references is free again."""
        for slot in slots:
            if not self._references[slot]:
                raise ValueError(f"slot {slot} is released more often than it was taken")
            self._references[slot] -= 1
            if not self._references[slot]:
                insort(self._free, slot)

    def integrity_check(self) -> None:
        """Raises AssertionError when the free list and the counts disagree."""
        assert self._free == [slot for slot, held in enumerate(self._references) if held == 0]

    def _find(self, after: int | None, wanted: int) -> int:
        """Index into the free list where the next run of up to `wanted` slots is to begin."""
        free = self._free
        if after is not None:
            index = bisect_left(free, after + 1)
            if index < len(free) and free[index] == after + 1:
                return index
        best, best_length, start = 0, 0, 0
        for index in range(1, len(free) + 1):
            if index == len(free) or free[index] != free[index - 1] + 1:
                if index - start >= wanted:
                    return start
                if index - start > best_length:
                    best, best_length = start, index - start
                start = index
        return best
