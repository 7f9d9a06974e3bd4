"""Which page of the KV cache lies where: the policy of the tiers. Plain bookkeeping on the leader, without a tensor.

A page that is being filled lies on the device. A full page never changes, so it may lie in several tiers at once:
it is written through to the host when it fills, which makes its eviction from the device a drop. Device and host
give up their oldest pages first, but for the first page of a sequence: what is left is the first page, the newest
ones and as much of the middle as fits, and it stays so while a sequence is scanned. Where the host is nearly full, its
oldest pages are written to disk ahead of need.

Transfers run on the ranks while steps go on. A slot changes hands only when no transfer reads or fills it any more.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from distkv.errors import CapacityError
from distkv.storage.slot_allocator import SlotAllocator
from distkv.storage.tier import Tier, Transfer, location

MAX_DISK_WRITES = 4  # pages on their way to disk at a time
ALL_TIERS = tuple(Tier)
WRITE_RETRY = 256  # steps after which a disk that refused a page is tried again


@dataclass(eq=False, slots=True)
class Page:
    """`page_size` tokens of one or several sequences, and its copies by tier."""

    index: int  # logical place in its sequences
    references: int = 1
    full: bool = False
    fresh: bool = True  # nothing of it was written yet, so its device slot holds what was there before
    repairs: int = 0  # how often it was lost and computed again
    slots: list[int | None] = field(default_factory=lambda: [None, None, None])
    filling: list[int | None] = field(default_factory=lambda: [None, None, None])  # transfer that fills the copy
    reading: list[int] = field(default_factory=lambda: [0, 0, 0])  # transfers that read the copy

    def has(self, tier: Tier) -> bool:
        """Whether a whole copy lies in the tier."""
        return self.slots[tier] is not None and self.filling[tier] is None

    @property
    def lost(self) -> bool:
        """Whether no copy is left, so that it must be computed again."""
        return not (self.has(Tier.DEVICE) or self.has(Tier.HOST) or self.has(Tier.DISK))

    @property
    def location(self) -> int:
        """Where a step is to read it, see `tier.location`; raises AssertionError when it is lost."""
        for tier in ALL_TIERS:  # the enumeration itself would take half of a long context's planning
            slot = self.slots[tier]
            if slot is not None and self.filling[tier] is None:
                return location(tier, slot)
        raise AssertionError(f"page {self.index} has no copy to read")


class TieredCache:
    """The pages of all sequences over `num_pages` slots per tier (device, host, disk; 0 for a tier that is off).

    Device slots are taken in `allocate`, after `reserve` has made room. Everything else that moves is queued for the
    next step plan (`take_transfers`), and its end is told by `apply`.
    """

    def __init__(self, num_pages: tuple[int, int, int], step_pages: int):
        """
        Args:
            step_pages: device pages that a step may fill at most; so many are kept free on device and host before
                pages are brought back up.
        """
        self.slots = tuple(SlotAllocator(count) for count in num_pages)
        self._step_pages = step_pages
        self._full: tuple[dict[Page, None], ...] = ({}, {}, {})  # full pages with a whole copy, oldest first
        self._pages: dict[Page, None] = {}  # all that a sequence holds
        self._unspilled: deque[Page] = deque()  # full, on the device alone
        self._in_flight: dict[int, tuple[Transfer, Page]] = {}
        self._forced: set[int] = set()  # done as far as the plans go, though no rank has said so yet
        self._queued: list[Transfer] = []
        self._wait: list[int] = []
        self._next_id = 0
        self._emptying_host = False
        self._writes_paused = 0  # steps until the disk is tried again
        self._disk_refusal = ""  # why it refused a page last
        self.lost: dict[Page, None] = {}  # pages that a sequence holds and no tier does
        # what the catalogue has not been told yet: disk slots that hold no page any more, and new ones with the ids of
        # the transfers that wrote them
        self.vacated: set[int] = set()
        self.written: dict[int, int] = {}

    @property
    def capacity(self) -> int:
        """Distinct pages that fit: all slots, unless the disk refuses more than it holds."""
        device, host, disk = self.slots
        return device.num_slots + host.num_slots + (disk.num_used if self._writes_paused else disk.num_slots)

    @property
    def disk_refusal(self) -> str:
        """A remark on why the disk takes no more pages; empty when it does."""
        return f" (the disk refuses more: {self._disk_refusal})" if self._writes_paused else ""

    def retry_disk(self) -> None:
        """Lets the disk be tried again before its time."""
        self._writes_paused = 0

    @property
    def has_cold(self) -> bool:
        """Whether some page may lie below the device alone."""
        return len(self._pages) > self.slots[Tier.DEVICE].num_used

    @property
    def num_pages(self) -> int:
        """Distinct pages that sequences hold."""
        return len(self._pages)

    @property
    def awaited(self) -> list[int]:
        """Transfers to wait for when `reserve` cannot go on: the oldest write to disk, or else all that are on their
        way."""
        return self._disk_writes[:1] or list(self._in_flight)

    @property
    def _disk_writes(self) -> list[int]:
        return [id for id, (transfer, _) in self._in_flight.items() if transfer.target is Tier.DISK]

    # --- pages ---

    def reserve(self, count: int) -> bool:
        """Makes `count` device slots free. False: transfers must end first; run a plan that waits for `awaited`, and
        ask again. Raises CapacityError when no tier has room for what must leave the device."""
        device = self.slots[Tier.DEVICE]
        while device.num_free < count:
            victim = next((page for page in self._full[Tier.DEVICE] if page.index), None)
            victim = victim or next(iter(self._full[Tier.DEVICE]), None)
            if victim is None and self._in_flight:
                return False
            if victim is None:
                raise CapacityError(
                    f"{count} device pages are needed in a step, {device.num_free} of {device.num_slots} are free and "
                    "the others are being written; raise device_kv_bytes, or lower max_num_seqs or "
                    "max_num_batched_tokens"
                )
            try:
                if not self._make_backed(victim):
                    return False
            except CapacityError:  # nothing moves any more; of a page that is on disk the device copy can still go
                victim = next((page for page in self._full[Tier.DEVICE] if page.has(Tier.DISK)), None)
                if victim is None:
                    raise
            if victim.slots[Tier.DEVICE] is not None:  # else it was held by nobody but the transfer that has ended
                self._drop(victim, Tier.DEVICE)
        return True

    def allocate(self, index: int, after: Page | None = None) -> Page:
        """A page to be filled, on the device, with the old content of its slot; behind page `after` where that is
        free."""
        page = Page(index)
        self._take(page, Tier.DEVICE, after.slots[Tier.DEVICE] if after else None)
        self._pages[page] = None
        return page

    def restore(self, page: Page) -> None:
        """Gives a lost page a device slot to be filled again; `fill` must follow, or `forget`."""
        assert page.lost
        page.full = False
        self._take(page, Tier.DEVICE)

    def forget(self, page: Page) -> None:
        """Takes a page back whose restoration has failed; it is as lost as before."""
        self._drop(page, Tier.DEVICE)
        page.full = True

    def share(self, page: Page) -> None:
        """Adds a holder."""
        page.references += 1

    def release(self, page: Page) -> None:
        """Drops a holder; what nobody holds is free once no transfer touches it."""
        page.references -= 1
        assert page.references >= 0
        if not page.references:
            del self._pages[page]
            self.lost.pop(page, None)
            self._free_idle(page)

    def fill(self, page: Page) -> None:
        """Tells that a page on the device is full and its content final."""
        page.full = True
        if page in self.lost:
            del self.lost[page]
            page.repairs += 1
        self._full[Tier.DEVICE][page] = None
        if self.slots[Tier.HOST].num_slots:
            self._unspilled.append(page)

    # --- what each step plan does ---

    def balance(self) -> None:
        """Queues write-through to the host, and writes to disk while the host is nearly full."""
        self._writes_paused = max(0, self._writes_paused - 1)
        host = self.slots[Tier.HOST]
        while self._unspilled and host.num_free:
            page = self._unspilled.popleft()
            if page.references and page.has(Tier.DEVICE) and page.slots[Tier.HOST] is None:
                self._start(page, Tier.DEVICE, Tier.HOST)
        if not self.slots[Tier.DISK].num_slots:
            return
        low = min(self._step_pages, max(1, host.num_slots // 4))
        if host.num_free < low:
            self._emptying_host = True
        if self._emptying_host:
            self._empty_host(min(2 * low, host.num_slots))

    def promote(self, cold: Iterable[Page]) -> None:
        """Queues bringing pages up to stay, in the order given, while a tier has twice the room that a step needs."""
        device, host, _ = self.slots
        for page in cold:
            up = device.num_free > 2 * self._step_pages, host.num_free > 2 * self._step_pages
            if not any(up):
                return
            if page.slots[Tier.DEVICE] is not None:
                continue
            if page.has(Tier.HOST):
                if up[0]:
                    self._start(page, Tier.HOST, Tier.DEVICE)
            elif page.has(Tier.DISK) and page.slots[Tier.HOST] is None and up[1]:
                self._start(page, Tier.DISK, Tier.HOST)

    def take_transfers(self) -> tuple[list[Transfer], list[int]]:
        """What the next plan has to start, and the ids that it must see done before it touches pages."""
        taken = self._queued, self._wait
        self._queued, self._wait = [], []
        return taken

    def put_back(self, transfers: list[Transfer], wait: list[int]) -> None:
        """Undoes `take_transfers` for a plan that may not have reached the ranks; they pass over what they know."""
        self._queued, self._wait = transfers + self._queued, wait + self._wait

    def apply(self, done: Iterable[int], failed: Iterable[tuple[int, str]], bad_reads: Iterable[int]) -> set[Page]:
        """Takes in what the ranks report.

        Args:
            done, failed: ids of transfers; a failure comes with its reason.
            bad_reads: disk slots whose content a step could not read.

        Returns the pages of `bad_reads`. Those that lie nowhere else are in `lost` now, and so are those that a failed
        transfer could not read.
        """
        for id in done:
            self._end(id)
        damaged = set()
        for id, reason in failed:
            transfer, page = self._in_flight[id]
            self._end(id, failed=True)
            if transfer.target is Tier.DISK:
                self._writes_paused, self._disk_refusal = WRITE_RETRY, reason
            else:
                damaged.add(page)
        bad = set(bad_reads)
        unread = {page for page in self._pages if page.slots[Tier.DISK] in bad} if bad else set()
        for page in damaged | unread:
            if page.has(Tier.DISK) and not page.reading[Tier.DISK]:
                self._drop(page, Tier.DISK)
            if page.references and page.lost:
                self.lost[page] = None
        return unread

    def integrity_check(self) -> None:
        """Raises AssertionError when slots, pages and transfers do not add up."""
        pages = set(self._pages) | {page for _, page in self._in_flight.values()}
        for tier in Tier:
            owners = [page for page in pages if page.slots[tier] is not None]
            used = {page.slots[tier] for page in owners}
            assert len(used) == len(owners), f"a {tier.name} slot has two pages"
            self.slots[tier].integrity_check({slot for slot in used if slot is not None})
            whole = {page for page in owners if page.full and page.has(tier)}
            assert set(self._full[tier]) == whole
            for page in owners:
                ways = [transfer for transfer, owner in self._in_flight.values() if owner is page]
                assert page.reading[tier] == sum(transfer.source is tier for transfer in ways)
                filling = [transfer.id for transfer in ways if transfer.target is tier]
                assert filling == ([] if page.filling[tier] is None else [page.filling[tier]])
        assert all(page.references > 0 for page in self._pages)
        assert set(self.lost) == {page for page in self._pages if page.full and page.lost}
        assert all(page.full or page.slots[Tier.HOST] is page.slots[Tier.DISK] is None for page in self._pages)

    # --- how ---

    def _make_backed(self, page: Page) -> bool:
        """Sees to a copy below the device; False when transfers must end first."""
        if page.slots[Tier.HOST] is None and not page.has(Tier.DISK):
            if not self._make_host_room():
                return False
            self._start(page, Tier.DEVICE, Tier.HOST)
        self._settle(page)
        return page.slots[Tier.DEVICE] is None or page.has(Tier.HOST) or page.has(Tier.DISK)

    def _settle(self, page: Page) -> None:
        """Has the next plan wait for the copy of the page from device to host, which cannot fail."""
        for id, (transfer, owner) in list(self._in_flight.items()):
            if owner is page and transfer.source is Tier.DEVICE:
                self._wait.append(id)
                self._forced.add(id)
                self._finish(id)

    def _make_host_room(self) -> bool:
        host, disk = self.slots[Tier.HOST], self.slots[Tier.DISK]
        if host.num_free:
            return True
        pages = [page for page in self._full[Tier.HOST] if not page.reading[Tier.HOST]]
        backed = next((page for page in pages if page.has(Tier.DISK)), None)
        if backed is None:
            if disk.num_slots and not self._writes_paused:
                self._write_to_disk(pages)
            if self._disk_writes:
                return False
            backed = next((page for page in pages if page.has(Tier.DEVICE)), None)
        if backed is None and self._in_flight:
            return False
        if backed is None:
            raise CapacityError(
                f"device, host and disk hold {[slots.num_used for slots in self.slots]} KV pages of "
                f"{[slots.num_slots for slots in self.slots]} and have no room for another{self.disk_refusal}; raise "
                "host_kv_bytes or disk_kv_bytes, or make room on the disk"
            )
        self._drop(backed, Tier.HOST)
        if backed.slots[Tier.DISK] is None:
            self._unspilled.append(backed)
        return True

    def _empty_host(self, wanted: int) -> None:
        """Frees host slots until `wanted` are free: drops what is on disk, and writes the oldest of the others."""
        host = self.slots[Tier.HOST]
        for page in [page for page in self._full[Tier.HOST] if page.has(Tier.DISK)]:
            if host.num_free >= wanted:
                break
            if not page.reading[Tier.HOST]:
                self._drop(page, Tier.HOST)
        if host.num_free >= wanted:
            self._emptying_host = False
        elif not self._writes_paused and host.num_free + len(self._disk_writes) < wanted:
            self._write_to_disk(page for page in self._full[Tier.HOST] if not page.reading[Tier.HOST])

    def _write_to_disk(self, pages: Iterable[Page]) -> None:
        """Starts writing the first of `pages` that have no copy there, as far as slots and MAX_DISK_WRITES allow."""
        room = MAX_DISK_WRITES - len(self._disk_writes)
        for page in pages:
            if room <= 0:
                return
            if page.slots[Tier.DISK] is None:
                if not self.slots[Tier.DISK].num_free and not self._reclaim_disk_slot():
                    return
                self._start(page, Tier.HOST, Tier.DISK)
                room -= 1

    def _reclaim_disk_slot(self) -> bool:
        """Drops the disk copy of a page that lies further up as well."""
        for page in self._full[Tier.DISK]:
            if not page.reading[Tier.DISK] and (page.has(Tier.HOST) or page.has(Tier.DEVICE)):
                self._drop(page, Tier.DISK)
                return True
        return False

    def _start(self, page: Page, source: Tier, target: Tier) -> None:
        self._take(page, target)
        source_slot, target_slot = page.slots[source], page.slots[target]
        assert source_slot is not None and target_slot is not None
        transfer = Transfer(self._next_id, source, source_slot, target, target_slot)
        self._next_id += 1
        page.filling[target] = transfer.id
        page.reading[source] += 1
        self._in_flight[transfer.id] = transfer, page
        self._queued.append(transfer)

    def _end(self, id: int, failed: bool = False) -> None:
        if id in self._forced:
            self._forced.remove(id)
        else:
            self._finish(id, failed)

    def _finish(self, id: int, failed: bool = False) -> None:
        transfer, page = self._in_flight.pop(id)
        page.reading[transfer.source] -= 1
        page.filling[transfer.target] = None
        self._full[transfer.target][page] = None
        if transfer.target is Tier.DISK:
            self.written[transfer.target_slot] = id
        if failed:
            self._drop(page, transfer.target)
        if not page.references:
            self._free_idle(page)

    def _take(self, page: Page, tier: Tier, after: int | None = None) -> None:
        [page.slots[tier]] = self.slots[tier].allocate(1, after)

    def _drop(self, page: Page, tier: Tier) -> None:
        slot = page.slots[tier]
        assert slot is not None and page.filling[tier] is None and not page.reading[tier]
        page.slots[tier] = None
        self._full[tier].pop(page, None)
        self.slots[tier].free(slot)
        if tier is Tier.DISK:
            self._writes_paused = 0  # there is room again
            self.written.pop(slot, None)
            self.vacated.add(slot)

    def _free_idle(self, page: Page) -> None:
        """Frees the copies of a page without holders that no transfer touches."""
        for tier in Tier:
            if page.has(tier) and not page.reading[tier]:
                self._drop(page, tier)
