"""Which slots of a pool are free. Bookkeeping only, no tensor."""

from bisect import bisect_left, insort

from distkv.errors import CapacityError


class SlotAllocator:
    """Hands out slots `0 .. num_slots - 1`.

    A slot next to the one a sequence ended with is preferred, then the start of the lowest long run of free slots, so
    that the pages of a sequence tend to be neighbours and attention reads them as one view.
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._free = list(range(num_slots))  # sorted

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Takes `count` slots, beginning right behind slot `after` where that is free.

        Raises CapacityError, and takes none, when fewer are free.
        """
        if count > len(self._free):
            raise CapacityError(f"{count} KV pages are needed and {len(self._free)} of {self.num_slots} are free")
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
        return taken

    def free(self, slot: int) -> None:
        """Gives a taken slot back; raises ValueError for one that is free."""
        index = bisect_left(self._free, slot)
        if not 0 <= slot < self.num_slots or self._free[index : index + 1] == [slot]:
            raise ValueError(f"slot {slot} is not taken")
        insort(self._free, slot)

    def integrity_check(self, used: set[int]) -> None:
        """Raises AssertionError unless exactly the `used` slots are taken."""
        assert self._free == [slot for slot in range(self.num_slots) if slot not in used]

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
