"""What has happened to slots of the disk tier since the catalogue was brought up to date."""

from dataclasses import dataclass, field

from distkv.storage.ledger.page import Page


@dataclass
class DiskChanges:
    """What a catalogue has to take in, in this order."""

    vacated: set[int] = field(default_factory=set)  # slots that hold no page with a key any more
    # new pages by slot, with the id of the transfer that wrote each
    written: dict[int, tuple[int, Page]] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)  # slots whose pages were used again

    def __bool__(self) -> bool:
        return bool(self.vacated or self.written or self.touched)


class DiskJournal:
    """Collects changes until somebody takes them, which must happen before a vacated slot can be written again, so with
    every plan.

    `write` and `touch` hold until `vacate` of the same slot; `take` closes all of them.
    """

    def __init__(self) -> None:
        self.changes = DiskChanges()  # that nobody has taken yet

    def write(self, slot: int, id: int, page: Page) -> None:
        """Notes that transfer `id` has written a page with a key."""
        self.changes.written[slot] = id, page

    def touch(self, slot: int) -> None:
        """Notes that a page was used."""
        self.changes.touched.add(slot)

    def vacate(self, slot: int) -> None:
        """Notes that a slot holds no page any more that a later process may find."""
        self.changes.written.pop(slot, None)
        self.changes.touched.discard(slot)
        self.changes.vacated.add(slot)

    def forget_uses(self) -> None:
        """Undoes every `touch` that nobody has taken."""
        self.changes.touched.clear()

    def take(self) -> DiskChanges:
        """All changes since it was called last."""
        taken, self.changes = self.changes, DiskChanges()
        return taken
