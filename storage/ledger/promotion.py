"""Pages that are brought up to stay."""

from collections.abc import Iterable, Iterator

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.tier import DEVICE, DISK, HOST, Tier


class Promotion:
    """Copies from disk to host, and from host to device, while there is ample room: what comes up must not push out
    what a step needs."""

    def __init__(self, ledger: TierLedger, low: tuple[int, int]):
        """
        Args:
            low: free slots that device and host need; twice as many stay free.
        """
        self._ledger = ledger
        self._low = low

    @property
    def may_promote(self) -> bool:
        """See `TieredCache.may_promote`."""
        held = self._ledger.held
        return (held.num_on_device < len(held) and self._has_room(DEVICE)) or (
            held.num_above_disk < len(held) and self._has_room(HOST)
        )

    def promote(self, cold: Iterable[Page]) -> None:
        """See `TieredCache.promote`."""
        for page in cold:
            if page.slots[DEVICE] is not None:
                continue
            if page.has(HOST):
                if self._ledger.is_hosts(page):
                    continue
                if self._make_room(DEVICE, page):
                    self._ledger.start(page, HOST, DEVICE)
                elif not self._has_room(HOST):
                    return
            elif page.has(DISK) and page.slots[HOST] is None:
                if self._make_room(HOST, page):
                    self._ledger.start(page, DISK, HOST)
                elif not self._has_room(DEVICE):
                    return

    def _has_room(self, tier: Tier) -> bool:
        """Whether more than twice the room that must be free in a tier is free, or may be freed for a page."""
        room = self._ledger.slots[tier].num_free + self._ledger.idle.count(tier)
        if tier is DEVICE:
            room += len(self._ledger.held.parked)
        return room > 2 * self._low[tier]

    def _make_room(self, tier: Tier, page: Page) -> bool:
        """Sees to a free slot to bring a page up; where too few are free, another page gives way."""
        if not self._has_room(tier) or self._ledger.shares.is_full(tier, page.tenant):
            return False
        wanted = min(self._ledger.slots[tier].num_free, 2 * self._low[tier]) + 1
        return self._ledger.make_room(tier, self._victims(tier, page), wanted)

    def _victims(self, tier: Tier, page: Page) -> Iterator[Page]:
        """Pages that lie below already and give way to another, the first to go first: an idle one, unless it was used
        after an idle one that comes; on the device the parked ones."""
        idle = self._ledger.idle.oldest(tier, saved_in=(HOST, DISK) if tier is DEVICE else (DISK,))
        is_younger = idle is not None and page.is_idle and idle.stamp > page.stamp
        if idle is not None and not (is_younger and not self._ledger.shares.is_over(tier, idle.tenant)):
            yield idle
        if tier is DEVICE and page.references:
            parked = (one for one in self._ledger.held.parked if not one.reading[DEVICE])
            yield from (one for one in parked if one.has(HOST) or one.has(DISK))
