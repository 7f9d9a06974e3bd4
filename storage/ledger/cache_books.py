"""The books of the tiered cache: pages, their slots, who holds them, and transfers on their way. Without a tensor.

A page that is being filled lies on the device. A full page never changes, so it may lie in several tiers at once. A
page with a name stays when its last holder lets go: it is idle, in whatever tiers it lies, until a request with the
same prefix takes it up again or its room is needed.

Transfers run on the ranks while steps go on. A slot changes hands only when no transfer reads or fills it any more.
Plans run one after another, and a report may come when the next plan is settled already.
"""

from collections import deque
from collections.abc import Iterable

from distkv.storage.ledger.idle_pages import IdlePages
from distkv.storage.ledger.page import ALL_TIERS, Page, PageKey
from distkv.storage.ledger.prefix_index import PrefixIndex
from distkv.storage.ledger.slot_allocator import SlotAllocator
from distkv.storage.tier import Tier, Transfer

WRITE_RETRY = 256  # steps after which a disk that refused a page is tried again
DEVICE, HOST, DISK = ALL_TIERS


class CacheBooks:
    """What `TieredCache` decides upon, and the changes that keep it true."""

    def __init__(self, num_pages: tuple[int, int, int], step_pages: int, write_through: bool = False):
        """
        Args:
            step_pages: device pages that a step may fill at most; twice as many are kept free on device and, if it is
                large enough, host before pages are brought back up.
            write_through: named pages are written to disk as soon as they are full, not only when they are idle.
        """
        self.slots = tuple(SlotAllocator(count) for count in num_pages)
        self.index = PrefixIndex()
        self._low = step_pages, min(step_pages, max(1, num_pages[HOST] // 4))  # free slots that device and host need
        self._write_through = write_through
        self._idle = IdlePages()
        self._num_idle = 0
        self._full: tuple[dict[Page, None], ...] = ({}, {}, {})  # held full pages with a whole copy, oldest first
        self._parked: dict[Page, None] = {}  # held full pages on the device whose sequences wait
        self._pages: dict[Page, None] = {}  # all that a sequence holds
        self._held_on_device = 0  # of them those with a slot on the device, and with one there or on the host
        self._held_above_disk = 0
        self._free_ids: list[int] = []
        self._next_page_id = 0
        self._relocated: dict[Page, None] = {}  # held pages whose location the ranks have not been told
        self._unspilled: deque[Page] = deque()  # full, on the device alone
        self._unsaved: deque[Page] = deque()  # named, on the host and not on disk
        self._in_flight: dict[int, tuple[Transfer, Page]] = {}
        self._forced: set[int] = set()  # done as far as the plans go, though no rank has said so yet
        self._queued: list[Transfer] = []
        self._wait: list[int] = []
        self._next_id = 0
        self._emptying_host = False
        self._writes_paused = 0  # steps until the disk is tried again
        self._disk_refusal = ""  # why it refused a page last
        self._refusals = 0  # in a row
        self._dropped: dict[int, Page] = {}  # disk slots given up since the last report, and what they held
        self.lost: dict[Page, None] = {}  # pages that a sequence holds and no tier does
        # what the catalogue has not been told yet: disk slots that hold no named page any more, new ones with the ids
        # of the transfers that wrote them, and those that were used again
        self.vacated: set[int] = set()
        self.written: dict[int, tuple[int, Page]] = {}
        self.touched: set[int] = set()

    @property
    def num_pages(self) -> int:
        """Distinct pages that sequences hold."""
        return len(self._pages)

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds and a later request may find."""
        return self._num_idle

    @property
    def has_cold(self) -> bool:
        """Whether some held page may lie below the device alone."""
        return len(self._pages) > self._held_on_device

    @property
    def awaited(self) -> list[int]:
        """Transfers to wait for when `reserve` cannot go on: the oldest write to disk, or else all that are on their
        way."""
        return self._disk_writes[:1] or list(self._in_flight)

    @property
    def _disk_writes(self) -> list[int]:
        return [id for id, (transfer, _) in self._in_flight.items() if transfer.target is DISK]

    def allocate(self, index: int, after: Page | None = None) -> Page:
        """A page to be filled, on the device, with the old content of its slot; behind page `after` where that is
        free."""
        page = Page(index)
        slot = self._allocate(DEVICE, after.slots[DEVICE] if after else None)
        self._hold(page)
        self._set_slot(page, DEVICE, slot)
        return page

    def restore(self, page: Page) -> None:
        """Gives a lost page a device slot to be filled again; `fill` must follow, or `forget`."""
        assert page.lost
        page.full = False
        self._set_slot(page, DEVICE, self._allocate(DEVICE))
        self._relocated[page] = None

    def forget(self, page: Page) -> None:
        """Takes a page back whose restoration has failed; it is as lost as before."""
        self._drop(page, DEVICE)
        page.full = True

    def share(self, page: Page) -> None:
        """Adds a holder to a page that is held or idle."""
        if not page.references:
            assert page.is_idle
            self._leave_idle(page)
            self._hold(page)
        self._parked.pop(page, None)
        page.references += 1

    def release(self, page: Page) -> None:
        """Drops a holder. What nobody holds is idle if it has a name, and else free once no transfer touches it."""
        if page.references == 1 and page in self.lost and page.key is not None:
            self._forget(page)
        page.references -= 1
        assert page.references >= 0
        if page.references:
            return
        if page.twin is not None:
            self.touch([page.twin])
        del self._pages[page]
        self._relocated.pop(page, None)
        self._parked.pop(page, None)
        self._free_ids.append(page.id)
        self._count(page, -1)
        self.lost.pop(page, None)
        if page.key is None:
            self._free_unheld(page)
        else:
            self._become_idle(page)

    def fill(self, page: Page, key: PageKey | None = None) -> None:
        """Tells that a page on the device is full and its content final; under its name it may be found, unless
        another page of the same content is there already."""
        page.full = True
        if page in self.lost:
            del self.lost[page]
            page.repairs += 1
        elif key is not None:
            known = self.index.add(page, key)
            page.twin = known if known is not page else None
        self._full[DEVICE][page] = None
        if self.slots[HOST].num_slots:
            self._unspilled.append(page)

    def find(self, keys: Iterable[PageKey]) -> list[Page]:
        """The pages of the longest prefix of a chain that can be read."""
        found = self.index.longest(keys)
        return next((found[:number] for number, page in enumerate(found) if page.lost), found)

    def touch(self, pages: list[Page]) -> None:
        """Makes idle pages of one prefix the most recently used, for a request that is about to take them up."""
        for page in reversed(pages):
            if page.is_idle:
                self._leave_idle(page)
                self._become_idle(page)

    def adopt(self, entries: Iterable[tuple[int, int, PageKey]]) -> None:
        """Takes in pages that an earlier process left on disk, as (slot, index, name), least recently used first."""
        for slot, index, key in entries:
            page = Page(index, references=0, full=True)
            if self.index.add(page, key) is page:
                self.slots[DISK].take(slot)
                page.slots[DISK] = slot
                self._become_idle(page)

    def reset(self) -> None:
        """Forgets all names, so that nothing is found any more; idle pages are free once no transfer touches them."""
        for page in self.index:
            slot = page.slots[DISK]
            if page.has(DISK) and slot is not None:
                self.vacated.add(slot)
                self.written.pop(slot, None)
            if page.key is not None:  # else it went with one before it
                self._forget(page)
        self.touched.clear()

    def park(self, pages: Iterable[Page]) -> None:
        """Lets the device copies of a waiting sequence's pages go before those of others."""
        for page in pages:
            if page.references == 1 and page.full and page.has(DEVICE):
                self._parked[page] = None

    def unpark(self, pages: Iterable[Page]) -> None:
        """Ends `park`."""
        for page in pages:
            self._parked.pop(page, None)

    def take_transfers(self) -> tuple[list[Transfer], list[int]]:
        """What the next plan has to start, and the ids that it must see done before it touches pages."""
        taken = self._queued, self._wait
        self._queued, self._wait = [], []
        return taken

    def take_relocated(self) -> list[Page]:
        """Held pages that lie elsewhere than the ranks were told; to be told by the next plan that reads pages."""
        moved = [page for page in self._relocated if not page.lost]
        self._relocated = {page: None for page in self._relocated if page.lost}
        return moved

    def put_back(self, transfers: list[Transfer], wait: list[int], moved: Iterable[Page] = ()) -> None:
        """Undoes the takings for a plan that may not have reached the ranks; they pass over what they know."""
        self._queued, self._wait = transfers + self._queued, wait + self._wait
        for page in moved:
            if page.references:
                self._relocated[page] = None

    def apply(self, done: Iterable[int], failed: Iterable[tuple[int, str]], bad_reads: Iterable[int]) -> set[Page]:
        """Takes in what the ranks report of the plan that ended last.

        Args:
            done, failed: ids of transfers; a failure comes with its reason.
            bad_reads: disk slots whose content the plan's step could not read.

        Returns the held pages of `bad_reads`. Those that lie nowhere else are in `lost` now, and so are those that a
        failed transfer could not read.
        """
        for id in done:
            self._end(id)
        damaged = set()
        for id, reason in failed:
            transfer, page = self._in_flight[id]
            self._end(id, failed=True)
            if transfer.target is DISK:
                self._writes_paused, self._disk_refusal = WRITE_RETRY, reason
                self._refusals += 1
            else:
                damaged.add(page)
        unread = self._owners(set(bad_reads))
        self._dropped.clear()
        for page in damaged | unread:
            if page.has(DISK) and not page.reading[DISK]:
                self._drop(page, DISK)
            if page.references and page.lost:
                self.lost[page] = None
        return unread

    def integrity_check(self) -> None:
        """Raises AssertionError when slots, pages and transfers do not add up."""
        pages = set(self._pages) | {page for _, page in self._in_flight.values()} | set(self.index)
        for tier in Tier:
            owners = [page for page in pages if page.slots[tier] is not None]
            used = {page.slots[tier] for page in owners}
            assert len(used) == len(owners), f"a {tier.name} slot has two pages"
            self.slots[tier].integrity_check({slot for slot in used if slot is not None})
            whole = {page for page in owners if page.full and page.has(tier)}
            idle = {page for page in whole if page.is_idle}
            assert set(self._idle.pages(tier)) == idle
            assert set(self._full[tier]) == whole - idle
            for page in owners:
                ways = [transfer for transfer, owner in self._in_flight.values() if owner is page]
                assert page.reading[tier] == sum(transfer.source is tier for transfer in ways)
                filling = [transfer.id for transfer in ways if transfer.target is tier]
                assert filling == ([] if page.filling[tier] is None else [page.filling[tier]])
        assert all(page.references > 0 for page in self._pages)
        assert len({page.id for page in self._pages} | set(self._free_ids)) == self._next_page_id
        assert self._held_on_device == sum(page.slots[DEVICE] is not None for page in self._pages)
        above = sum(page.slots[DEVICE] is not None or page.slots[HOST] is not None for page in self._pages)
        assert self._held_above_disk == above
        assert set(self.lost) == {page for page in self._pages if page.full and page.lost}
        assert all(page.full or page.slots[HOST] is page.slots[DISK] is None for page in self._pages)
        assert all(page.references and page.has(DEVICE) for page in self._parked)
        assert self._num_idle == sum(page.is_idle for page in self.index)
        assert all(page.references or not page.lost for page in self.index)

    # --- how ---

    def _start(self, page: Page, source: Tier, target: Tier) -> None:
        self._set_slot(page, target, self._allocate(target))
        source_slot, target_slot = page.slots[source], page.slots[target]
        assert source_slot is not None and target_slot is not None
        transfer = Transfer(self._next_id, source, source_slot, target, target_slot)
        self._next_id += 1
        page.filling[target] = transfer.id
        page.reading[source] += 1
        self._in_flight[transfer.id] = transfer, page
        self._queued.append(transfer)

    def _settle(self, page: Page) -> None:
        """Has the next plan wait for the copy of the page from device to host, which cannot fail."""
        for id, (transfer, owner) in list(self._in_flight.items()):
            if owner is page and transfer.source is DEVICE:
                self._wait.append(id)
                self._forced.add(id)
                self._finish(id)

    def _end(self, id: int, failed: bool = False) -> None:
        if id in self._forced:
            self._forced.remove(id)
        else:
            self._finish(id, failed)

    def _finish(self, id: int, failed: bool = False) -> None:
        transfer, page = self._in_flight.pop(id)
        target = transfer.target
        page.reading[transfer.source] -= 1
        page.filling[target] = None
        if failed:
            self._drop(page, target)
        elif page.is_idle:
            self._idle.add(page, target)
        else:
            self._full[target][page] = None
        if page.references:
            self._relocated[page] = None
        elif page.key is None:
            self._free_unheld(page)
        if target is DISK and not failed:
            self._refusals = 0
        if failed or page.key is None:
            return
        if target is DISK:
            self.written[transfer.target_slot] = id, page
        elif target is HOST and self._is_to_save(page):
            self._unsaved.append(page)

    def _owners(self, disk_slots: set[int]) -> set[Page]:
        """The held pages that the last plan found in these slots."""
        if not disk_slots:
            return set()
        owners = {page.slots[DISK]: page for page in self._pages if page.has(DISK)} | self._dropped
        return {owners[slot] for slot in disk_slots if slot in owners and owners[slot].references}

    def _hold(self, page: Page) -> None:
        page.repairs = 0
        self._pages[page] = None
        if self._free_ids:
            page.id = self._free_ids.pop()
        else:
            page.id = self._next_page_id
            self._next_page_id += 1
        self._count(page, 1)
        self._relocated[page] = None

    def _become_idle(self, page: Page) -> None:
        self._num_idle += 1
        self._idle.touch(page)
        for tier in ALL_TIERS:
            if page.has(tier):
                self._full[tier].pop(page, None)
                self._idle.add(page, tier)
        if page.has(DISK):
            self.touched.add(page.slots[DISK] or 0)
        if page.has(HOST) and self._is_to_save(page):
            self._unsaved.appendleft(page)  # pages are released from the last to the first, and the first goes first

    def _leave_idle(self, page: Page) -> None:
        self._num_idle -= 1
        for tier in ALL_TIERS:
            if page.has(tier):
                self._idle.discard(page, tier)
                self._full[tier][page] = None

    def _is_to_save(self, page: Page) -> bool:
        return page.key is not None and page.slots[DISK] is None and (self._write_through or not page.references)

    def _drop(self, page: Page, tier: Tier) -> None:
        """Gives a copy up; an idle page whose last copy this was is forgotten."""
        slot = page.slots[tier]
        assert slot is not None and page.filling[tier] is None and not page.reading[tier]
        self._set_slot(page, tier, None)
        self._full[tier].pop(page, None)
        self._idle.discard(page, tier)
        self.slots[tier].free(slot)
        if tier is DEVICE:
            self._parked.pop(page, None)
        elif tier is DISK:
            self._writes_paused = 0  # there is room again
            self.written.pop(slot, None)
            self.touched.discard(slot)
            self.vacated.add(slot)
            self._dropped[slot] = page
        if page.references:
            self._relocated[page] = None
        elif page.key is not None and page.lost:
            self._forget(page)

    def _forget(self, page: Page) -> None:
        """Takes the name of a page. An idle one is free then, and so are idle ones that follow it, lost to searches."""
        forgotten = [page]
        while forgotten:
            page = forgotten.pop()
            was_idle = page.is_idle
            forgotten += [follower for follower in self.index.remove(page) if follower.is_idle]
            if was_idle:
                self._leave_idle(page)
                self._free_unheld(page)

    def _free_unheld(self, page: Page) -> None:
        """Frees the copies of a nameless page without holders that no transfer touches."""
        for tier in ALL_TIERS:
            if page.has(tier) and not page.reading[tier]:
                self._drop(page, tier)

    def _count(self, page: Page, sign: int) -> None:
        """Counts a held page's slots in or out."""
        on_device = page.slots[DEVICE] is not None
        self._held_on_device += sign * on_device
        self._held_above_disk += sign * (on_device or page.slots[HOST] is not None)

    def _set_slot(self, page: Page, tier: Tier, slot: int | None) -> None:
        if page.references:
            self._count(page, -1)
        page.slots[tier] = slot
        if page.references:
            self._count(page, 1)

    def _allocate(self, tier: Tier, after: int | None = None) -> int:
        return self.slots[tier].allocate(1, after)[0]
