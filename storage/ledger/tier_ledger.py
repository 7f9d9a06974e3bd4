"""Which pages lie in which tiers, and the changes that keep pages, slots and transfers true to each other.

A page that is being filled lies on the device. A full page never changes, so it may lie in several tiers at once. A
page with a key stays when its last holder lets go: it is idle, in whatever tiers it lies, until a request with the
same prefix takes it up again or its room is needed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from distkv.storage.ledger.disk_journal import DiskJournal
from distkv.storage.ledger.disk_refusals import DiskRefusals
from distkv.storage.ledger.disk_slots import DiskSlots
from distkv.storage.ledger.held_pages import HeldPages
from distkv.storage.ledger.idle_pages import IdlePages
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.prefix_index import PrefixIndex
from distkv.storage.ledger.shares import Shares
from distkv.storage.ledger.slot_allocator import SlotAllocator
from distkv.storage.ledger.transfers import Transfers
from distkv.storage.paging import is_hosts
from distkv.storage.tier import ALL_TIERS, DEVICE, DISK, HOST, Tier, Transfer


class TierLedger:
    """Copies of pages by tier. It decides nothing.

    Each verb has one that closes it, and something holds in between:

    - `take_slot`, `drop`: the slot is the page's; from `enter` on it holds a whole copy of a full page, which has its
      turn among those of its tier.
    - `start`, `finish` or `fail`: see `Transfers`. `finish` enters the copy, `fail` drops it, and `force` has the end
      come at once.
    - `rest`, `wake`: nobody holds the page, and it may be found.
    - `index.add`, `forget`: the page may be found by its key.
    """

    def __init__(
        self, num_pages: tuple[int, int, int], write_through: bool, share: float | None = None, host_share: float = 0.0
    ):
        self.refusals = DiskRefusals()
        self.disk_slots = DiskSlots(num_pages[DISK], self.refusals)
        self.slots = SlotAllocator(num_pages[DEVICE]), SlotAllocator(num_pages[HOST]), self.disk_slots
        self.index = PrefixIndex()
        self.held = HeldPages()
        self.shares = Shares(num_pages, share)
        self.idle = IdlePages(self.shares)  # whole copies by tier, the first to go first
        self.num_idle = 0
        self.full: tuple[dict[Page, None], ...] = ({}, {}, {})  # the same of held pages by tier, oldest first
        self.transfers = Transfers()
        self.journal = DiskJournal()
        self.unspilled: dict[Page, None] = {}  # full, on the device alone, the first to be copied to the host first
        self.unsaved: OrderedDict[Page, None] = OrderedDict()  # on the host, to be written to disk, the first first
        self.put_off: dict[Page, None] = {}  # the same of those outlived by all on disk, when a slot there is free
        self._write_through, self.host_share = write_through, host_share
        self._dropped: dict[int, Page] = {}  # disk slots given up since the last report, and what they held

    def take_slot(self, page: Page, tier: Tier, after: int | None = None) -> None:
        """Gives a page a free slot, right behind slot `after` where that is free; raises CapacityError when none is."""
        [slot] = self.slots[tier].allocate(1, after)
        self.held.set_slot(page, tier, slot)
        self.shares.take(page, tier)

    def enter(self, page: Page, tier: Tier) -> None:
        """Enters a copy that is whole now."""
        if page.is_idle:
            self.idle.add(page, tier)
        else:
            self.full[tier][page] = None
            self.shares.enter(page, tier)

    def drop(self, page: Page, tier: Tier) -> None:
        """Gives a copy up; an idle page whose last copy this was is forgotten."""
        slot = page.slots[tier]
        assert slot is not None and page.filling[tier] is None and not page.reading[tier]
        self.held.set_slot(page, tier, None)
        self.shares.free(page, tier)
        self.full[tier].pop(page, None)
        self.shares.leave(page, tier)
        self.idle.discard(page, tier)
        self.slots[tier].free(slot)
        if tier is DEVICE:
            self.held.unpark(page)
            self.unspilled.pop(page, None)
        elif tier is HOST:
            self.unsaved.pop(page, None)
            self.put_off.pop(page, None)
        else:
            self.journal.vacate(slot)
            self._dropped[slot] = page
            if page.has(HOST) and self.needs_saving(page):
                self.unsaved[page] = None
        if page.references:
            self.held.relocate(page)
        elif page.key is not None and page.lost:
            self.forget(page)

    def make_room(
        self, tier: Tier, victims: Iterable[Page], wanted: int = 1, coming: Mapping[bytes, int] | None = None
    ) -> bool:
        """Drops the copies of victims in a tier, in the order given, until `wanted` slots are free; False when that
        takes more victims. None is asked for before it is needed.

        Args:
            coming: what tenants are about to take of the slots, which may be more than their share.
        """
        slots, remaining = self.slots[tier], iter(victims)
        with self.shares.expecting(tier, coming or {}):
            while slots.num_free < wanted:
                victim = next(remaining, None)
                if victim is None:
                    return False
                if victim.slots[tier] is not None:  # else it went when others gave way to it
                    self.drop(victim, tier)
            return True

    def start(self, page: Page, source: Tier, target: Tier) -> None:
        """Has the next plan copy a page into a free slot of another tier."""
        self.take_slot(page, target)
        if target is DISK:
            self.unsaved.pop(page, None)
            self.put_off.pop(page, None)
        self.transfers.start(page, source, target)

    def finish(self, id: int) -> None:
        """Takes in that a transfer has come to a good end."""
        ended = self.transfers.finish(id)
        if ended is not None:
            self._arrive(*ended)

    def fail(self, id: int, reason: str) -> Page | None:
        """Takes in that a transfer has failed. Returns the page when it could not be read; else the disk refused it."""
        ended = self.transfers.finish(id)
        assert ended is not None, "what is forced cannot fail"
        transfer, page = ended
        if transfer.target is DISK:
            self.disk_slots.refuse(transfer.target_slot, reason)
        self.drop(page, transfer.target)
        if not page.references and page.key is None:
            self.free_unheld(page)
        if transfer.target is not DISK:
            return page
        self.disk_slots.forget_files(transfer.target_slot)
        return None

    def force(self, page: Page) -> None:
        """Has the copy of a page from device to host, if one is under way, count as ended at once: the next plan waits
        for it."""
        transfer = self.transfers.force(page)
        if transfer is not None:
            self._arrive(transfer, page)

    def rest(self, page: Page) -> None:
        """Makes a page with a key, which nobody holds, the idle page that was used last."""
        self.num_idle += 1
        self.idle.touch(page)
        for tier in ALL_TIERS:
            if page.has(tier):
                self.full[tier].pop(page, None)
                self.shares.leave(page, tier)
                self.idle.add(page, tier)
        if page.has(DISK):
            self.journal.touch(page.slots[DISK] or 0)
        if page.has(HOST) and self.needs_saving(page):
            # pages are released from the last to the first, and the first goes first
            self.unsaved[page] = None
            self.unsaved.move_to_end(page, last=False)
        if self.shares.is_on and self.slots[HOST].num_slots and page.slots[HOST] is None and not page.has(DISK):
            self.unspilled[page] = None  # it may have been passed over, see `WriteBack`

    def claim(self, page: Page, tenant: bytes | None) -> None:
        """Takes note whose a held page is, of which nobody knew."""
        if page.tenant is None and tenant is not None:
            page.tenant = tenant
            for tier in ALL_TIERS:
                if page.slots[tier] is not None:
                    self.shares.take(page, tier)
                if page in self.full[tier]:
                    self.shares.enter(page, tier)

    def wake(self, page: Page) -> None:
        """Takes a page out of the idle ones."""
        self.num_idle -= 1
        for tier in ALL_TIERS:
            if page.has(tier):
                self.idle.discard(page, tier)
                self.full[tier][page] = None
                self.shares.enter(page, tier)

    def forget(self, page: Page) -> None:
        """Takes the key of a page. An idle one is free then, and so are idle ones that follow it, lost to searches."""
        forgotten = [page]
        while forgotten:
            page = forgotten.pop()
            was_idle = page.is_idle
            forgotten += [follower for follower in self.index.remove(page) if follower.is_idle]
            if was_idle:
                self.wake(page)
                self.free_unheld(page)

    def replace(self, known: Page, page: Page) -> bool:
        """Has a held page that is full take over the key of an idle one of the same content, and its copies below the
        device. False when it is not idle, or transfers touch it."""
        key = known.key
        if not known.is_idle or key is None or any(known.reading) or known.filling != (None, None, None):
            return False
        self.wake(known)
        self.index.remove(known)  # whose followers go on from the key
        self.index.add(page, key)
        for tier in (HOST, DISK):
            slot = known.slots[tier]
            if slot is not None:
                self.full[tier].pop(known)
                self.shares.leave(known, tier)
                self.shares.free(known, tier)
                self.held.set_slot(known, tier, None)
                self.held.set_slot(page, tier, slot)
                self.shares.take(page, tier)
                self.enter(page, tier)
        for queue in (self.unsaved, self.put_off):
            if known in queue:
                del queue[known]
                queue[page] = None
        self.free_unheld(known)
        return True

    def free_unheld(self, page: Page) -> None:
        """Frees the copies of a page without key and holders that no transfer touches."""
        for tier in ALL_TIERS:
            if page.has(tier) and not page.reading[tier]:
                self.drop(page, tier)

    def needs_saving(self, page: Page) -> bool:
        """Whether the page is to be written to disk for later processes."""
        is_wanted = page.key is not None and page.slots[DISK] is None and (self._write_through or not page.references)
        return is_wanted and self.slots[DISK].num_slots > 0

    def is_hosts(self, page: Page) -> bool:
        """Whether tokens of answers meet the page on the host, if it has a copy there."""
        return self.host_share > 0 and is_hosts(page.index, self.host_share)

    def take_owners(self, disk_slots: set[int]) -> set[Page]:
        """The held pages that the plan found in these slots which was reported last. To be called once a report."""
        dropped, self._dropped = self._dropped, {}
        if not disk_slots:
            return set()
        owners = {page.slots[DISK]: page for page in self.held if page.has(DISK)} | dropped
        return {owners[slot] for slot in disk_slots if slot in owners and owners[slot].references}

    def integrity_check(self) -> None:
        """Raises AssertionError when slots, pages and transfers do not add up."""
        pages = set(self.held) | {page for _, page in self.transfers.under_way.values()} | set(self.index)
        for tier in Tier:
            owners = [page for page in pages if page.slots[tier] is not None]
            used = {page.slots[tier] for page in owners}
            assert len(used) == len(owners), f"a {tier.name} slot has two pages"
            self.slots[tier].integrity_check({slot for slot in used if slot is not None})
            whole = {page for page in owners if page.full and page.has(tier)}
            idle = {page for page in whole if page.is_idle}
            assert set(self.idle.pages(tier)) == idle
            assert set(self.full[tier]) == whole - idle
            for page in owners:
                self.transfers.integrity_check(page, tier)
        self.held.integrity_check()
        self.shares.integrity_check(pages)
        assert all(page.full or page.slots[HOST] is page.slots[DISK] is None for page in self.held)
        assert all(page.has(DEVICE) for page in self.unspilled)
        assert all(page.has(HOST) and page.slots[DISK] is None for page in (*self.unsaved, *self.put_off))
        assert self.num_idle == sum(page.is_idle for page in self.index)
        assert all(page.references or not page.lost for page in self.index)

    def _arrive(self, transfer: Transfer, page: Page) -> None:
        target = transfer.target
        self.enter(page, target)
        if page.references:
            self.held.relocate(page)
        elif page.key is None:
            self.free_unheld(page)
        if target is DISK:
            self.refusals.accept()
        if page.key is None:
            return
        if target is DISK:
            self.journal.write(transfer.target_slot, transfer.id, page)
        elif target is HOST and self.needs_saving(page):
            self.unsaved[page] = None
