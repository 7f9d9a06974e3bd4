"""Which slots of a pool are free. Bookkeeping only, no tensor."""

from itertools import pairwise

from sortedcontainers import SortedDict

from distkv.storage.errors import CapacityError


class SlotAllocator:
    """Hands out slots `0 .. num_slots - 1`.

    A slot next to the one a sequence ended with is preferred, then the start of the lowest long run of free slots, so
    that the pages of a sequence tend to be neighbours and attention reads them as one view. Memory follows the number
    of runs, and so does the time of an `allocate` of more slots than the lowest runs have.
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._num_free = num_slots
        # runs of free slots, start -> end (exclusive); between two of them a slot is taken
        self._runs = SortedDict({0: num_slots} if num_slots else {})

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_slots - self._num_free

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Takes `count` slots, beginning right behind slot `after` where that is free.

        Raises CapacityError, and takes none, when fewer are free.
        """
        if count > self._num_free:
            raise CapacityError(f"{count} KV pages are needed and {self._num_free} of {self.num_slots} are free")
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            first = self._find(after, wanted)
            start, end = self._run_before(first)
            last = min(first + wanted, end)
            self._cut(start, first, last)
            taken += range(first, last)
            after = None  # the run behind it is used up
        return taken

    def take(self, slot: int) -> None:
        """Takes one particular slot; raises ValueError when it is not free."""
        start, end = self._run_before(slot)
        if not start <= slot < end:
            raise ValueError(f"slot {slot} is not free")
        self._cut(start, slot, slot + 1)

    def free(self, slot: int) -> None:
        """Gives a taken slot back; raises ValueError for one that is free."""
        start, end = self._run_before(slot)
        if not 0 <= slot < self.num_slots or slot < end:
            raise ValueError(f"slot {slot} is not taken")
        self._runs[start if end == slot else slot] = self._runs.pop(slot + 1, slot + 1)
        self._num_free += 1

    def integrity_check(self, used: set[int]) -> None:
        """Raises AssertionError unless exactly the `used` slots are taken."""
        edges = [-1, *sorted(used), self.num_slots]
        assert list(self._runs.items()) == [(low + 1, high) for low, high in pairwise(edges) if low + 1 < high]
        assert self._num_free == self.num_slots - len(used)

    def _run_before(self, slot: int) -> tuple[int, int]:
        """The last run that starts at or before the slot, an empty one below all slots when there is none."""
        index = self._runs.bisect_right(slot)
        return self._runs.peekitem(index - 1) if index else (-1, -1)

    def _cut(self, start: int, first: int, last: int) -> None:
        """Takes slots `first .. last - 1` out of the run that begins at `start`."""
        end = self._runs.pop(start)
        if start < first:
            self._runs[start] = first
        if last < end:
            self._runs[last] = end
        self._num_free -= last - first

    def _find(self, after: int | None, wanted: int) -> int:
        """The slot where the next run of up to `wanted` slots is to begin."""
        if after is not None:
            start, end = self._run_before(after + 1)
            if start <= after + 1 < end:
                return after + 1
        best, best_length = 0, 0
        for start, end in self._runs.items():
            if end - start >= wanted:
                return start
            if end - start > best_length:
                best, best_length = start, end - start
        return best
