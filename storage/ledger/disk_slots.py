"""Which slots of the disk tier can be written: those of a full disk are fewer than it was to have."""

from itertools import chain, islice

from distkv.storage.ledger.disk_refusals import DiskRefusals
from distkv.storage.ledger.slot_allocator import SlotAllocator


class DiskSlots(SlotAllocator):
    """A slot that is given up keeps its files until it is written again, which frees their bytes first, so such slots
    are handed out before others. While the disk refuses more, they alone are free: a page is written in the room of one
    that was given up for it, and a full disk is a tier of fewer slots."""

    def __init__(self, num_slots: int, refusals: DiskRefusals):
        super().__init__(num_slots)
        self._refusals = refusals
        self._vacated: dict[int, None] = {}  # free slots whose files are still there
        self._exchanged: set[int] = set()  # taken slots, whose files make the room for what is written there

    @property
    def num_free(self) -> int:
        if self._refusals.hopeless:
            return 0
        return len(self._vacated) if self._refusals.paused else super().num_free

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        if count == 1 and self._vacated:
            slot = next(iter(self._vacated))
            self.take(slot)
            if self._refusals.paused:
                self._exchanged.add(slot)
            return [slot]
        return super().allocate(count, after)

    def next_free(self, count: int) -> list[int]:
        """The slots that are handed out next, so many at most; they stay free."""
        others = (slot for start, end in self._runs.items() for slot in range(start, end) if slot not in self._vacated)
        return list(islice(chain(self._vacated, others), min(count, self.num_free)))

    def take(self, slot: int) -> None:
        super().take(slot)
        self._vacated.pop(slot, None)

    def free(self, slot: int) -> None:
        super().free(slot)
        self._vacated[slot] = None
        self._exchanged.discard(slot)

    def refuse(self, slot: int, reason: str) -> None:
        """Takes note that the disk did not take the page that a taken slot is for. It is to be freed without files."""
        self._refusals.refuse(reason, had_room=slot in self._exchanged)

    def forget_files(self, slot: int) -> None:
        """Takes note that a free slot has no files."""
        self._vacated.pop(slot, None)
