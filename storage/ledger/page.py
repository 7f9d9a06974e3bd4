"""A page as the leader knows it: bookkeeping only, no tensor.

There may be hundreds of thousands, which Python's garbage collector would walk through again and again, a third of a
second each time. So pages and keys are structs that it does not track; it need not, since no page leads back to itself.
"""

import msgspec

from distkv.storage.tier import ALL_TIERS, DEVICE, DISK, HOST, Tier, encode_location


class PageKey(msgspec.Struct, frozen=True, gc=False):
    """What a full page holds: its tokens, and by the chain of keys all tokens before them. See `prefix_index.py`."""

    digest: bytes
    parent: bytes  # key of the page before, or the chain's root
    tokens: bytes  # uint32, little endian


class Page(msgspec.Struct, eq=False, gc=False):
    """`page_size` tokens of one or several sequences, and its copies by tier."""

    index: int  # in its sequences
    id: int = -1  # by which ranks know it while it is held
    references: int = 1  # holders; an idle page has none, and may be found by its key
    tenant: bytes | None = None  # whose it is, see `Shares`; None while nobody knows
    key: PageKey | None = None  # None: nobody else may find it
    twin: "Page | None" = None  # the page of the same content that is found instead of this one, which has no key
    stamp: int = 0  # when an idle page was used last, in order
    full: bool = False
    repairs: int = 0  # how often it was lost and computed again
    # by tier; changed by `set_slot` and so on
    slots: tuple[int | None, ...] = (None, None, None)
    filling: tuple[int | None, ...] = (None, None, None)  # transfer that fills the copy
    reading: tuple[int, ...] = (0, 0, 0)  # transfers that read the copy

    def has(self, tier: Tier) -> bool:
        """Whether a whole copy lies in the tier."""
        return self.slots[tier] is not None and self.filling[tier] is None

    def set_slot(self, tier: Tier, slot: int | None) -> None:
        self.slots = (*self.slots[:tier], slot, *self.slots[tier + 1 :])

    def set_filling(self, tier: Tier, id: int | None) -> None:
        self.filling = (*self.filling[:tier], id, *self.filling[tier + 1 :])

    def count_reading(self, tier: Tier, change: int) -> None:
        """Takes note that one transfer more, or one less, reads a copy."""
        self.reading = (*self.reading[:tier], self.reading[tier] + change, *self.reading[tier + 1 :])

    @property
    def lost(self) -> bool:
        """Whether no copy is left, so that it must be computed again."""
        return not (self.has(DEVICE) or self.has(HOST) or self.has(DISK))

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds it and it may still be found."""
        return not self.references and self.key is not None

    @property
    def tier(self) -> Tier:
        """The fastest tier with a whole copy; raises AssertionError when it is lost."""
        for tier in ALL_TIERS:  # the enumeration itself would take longer than the loop
            if self.slots[tier] is not None and self.filling[tier] is None:
                return tier
        raise AssertionError(f"page {self.index} has no copy to read")

    @property
    def location(self) -> int:
        """Where a step is to read it, see `encode_location`; raises AssertionError when it is lost."""
        tier = self.tier
        slot = self.slots[tier]
        assert slot is not None
        return encode_location(tier, slot)
