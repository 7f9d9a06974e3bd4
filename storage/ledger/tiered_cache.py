"""Which page of the KV cache lies where: the policy of the tiers. Plain bookkeeping on the leader, without a tensor.

A full page is written through to the host when it fills, which makes its eviction from the device a drop. Held pages
leave device and host oldest first, but for the first page of a sequence: what is left is the first page, the newest
ones and as much of the middle as fits, and it stays so while a sequence is scanned. Where the host is nearly full, its
oldest pages are written to disk ahead of need.

Idle pages give way before held ones, least recently used first; they never count against the room that a request may
be promised. Those with a name are written to disk for later processes.
"""

from collections.abc import Iterable, Iterator

from distkv.storage.errors import CapacityError
from distkv.storage.ledger.cache_books import DEVICE, DISK, HOST, CacheBooks
from distkv.storage.ledger.page import Page
from distkv.storage.tier import Tier

MAX_DISK_WRITES = 4  # pages on their way to disk at a time
MAX_REFUSALS = 3  # of the disk in a row, after which idle pages there are not given up for room


class TieredCache(CacheBooks):
    """The pages of all sequences over `num_pages` slots per tier (device, host, disk; 0 for a tier that is off).

    Device slots are taken in `allocate`, after `reserve` has made room. Everything else that moves is queued for the
    next step plan (`take_transfers`), and its end is told by `apply`.
    """

    @property
    def capacity(self) -> int:
        """Distinct pages that sequences may hold: all slots, unless the disk refuses more than it holds."""
        device, host, disk = self.slots
        on_disk = disk.num_slots
        if self._writes_paused:
            on_disk = disk.num_used - (self._idle.count(DISK) if self._refusals >= MAX_REFUSALS else 0)
        return device.num_slots + host.num_slots + on_disk

    @property
    def disk_refusal(self) -> str:
        """A remark on why the disk takes no more pages; empty when it does."""
        return f" (the disk refuses more: {self._disk_refusal})" if self._writes_paused else ""

    def retry_disk(self) -> None:
        """Lets the disk be tried again before its time."""
        self._writes_paused = 0

    @property
    def may_promote(self) -> bool:
        """Whether `promote` may find something to do among the held pages."""
        return (self.has_cold and self._has_room_above(DEVICE)) or (
            self._held_above_disk < len(self._pages) and self._has_room_above(HOST)
        )

    def reserve(self, count: int) -> bool:
        """Makes `count` device slots free. False: transfers must end first; run a plan that waits for `awaited`, and
        ask again. Raises CapacityError when no tier has room for what must leave the device."""
        device = self.slots[DEVICE]
        while device.num_free < count:
            idle = self._idle.oldest(DEVICE, unread=False)
            if idle is not None:
                self._evict_idle(idle)
                continue
            victim = next(self._victims(), None)
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
                victim = next((page for page in self._full[DEVICE] if page.has(DISK)), None)
                if victim is None:
                    raise
            if victim.slots[DEVICE] is not None:  # else it was held by nobody but the transfer that has ended
                self._drop(victim, DEVICE)
        return True

    def balance(self) -> None:
        """Queues write-through to the host and to disk, and writes to disk while the host is nearly full."""
        self._writes_paused = max(0, self._writes_paused - 1)
        self._spill()
        if not self.slots[DISK].num_slots:
            return
        self._save()
        host = self.slots[HOST]
        if host.num_free < self._low[HOST]:
            self._emptying_host = True
        if self._emptying_host:
            self._empty_host(min(2 * self._low[HOST], host.num_slots))

    def promote(self, cold: Iterable[Page]) -> None:
        """Queues bringing pages up to stay, in the order given, while a tier has more than twice the room that must be
        free, counting what it may give up for them."""
        for page in cold:
            if page.slots[DEVICE] is not None:
                continue
            if page.has(HOST):
                if self._make_room_above(DEVICE, page):
                    self._start(page, HOST, DEVICE)
                elif not self._has_room_above(HOST):
                    return
            elif page.has(DISK) and page.slots[HOST] is None:
                if self._make_room_above(HOST, page):
                    self._start(page, DISK, HOST)
                elif not self._has_room_above(DEVICE):
                    return

    # --- how ---

    def _victims(self) -> Iterator[Page]:
        """Held pages whose device copy may go, the first to go first."""
        yield from self._parked
        yield from (page for page in self._full[DEVICE] if page.index)
        yield from self._full[DEVICE]

    def _evict_idle(self, page: Page) -> None:
        """Takes the device copy of an idle page; if it lies nowhere else, it goes to the host or is forgotten."""
        self._settle(page)
        if not (page.has(HOST) or page.has(DISK)) and self._displace_on_host(page) and page.has(DEVICE):
            self._start(page, DEVICE, HOST)
            self._settle(page)
        if page.has(DEVICE):  # else it followed the one that gave way on the host
            self._drop(page, DEVICE)

    def _displace_on_host(self, page: Page) -> bool:
        """Makes sure of a free host slot for an idle page at the cost of idle ones that matter less."""
        if self.slots[HOST].num_free:
            return True
        saved = self._idle.oldest(HOST, saved_in=(DEVICE, DISK))
        other = saved or self._idle.oldest(HOST)
        if other is None or (other is not saved and other.stamp > page.stamp):
            return False
        self._drop(other, HOST)
        return True

    def _make_backed(self, page: Page) -> bool:
        """Sees to a copy below the device; False when transfers must end first."""
        if page.slots[HOST] is None and not page.has(DISK):
            if not self._make_host_room():
                return False
            self._start(page, DEVICE, HOST)
        self._settle(page)
        return page.slots[DEVICE] is None or page.has(HOST) or page.has(DISK)

    def _make_host_room(self) -> bool:
        """Frees a host slot for a held page; False when transfers must end first."""
        host, disk = self.slots[HOST], self.slots[DISK]
        if host.num_free:
            return True
        idle = self._idle.oldest(HOST, saved_in=(DEVICE, DISK))
        if idle is not None:
            self._drop(idle, HOST)
            return True
        pages = [page for page in self._full[HOST] if not page.reading[HOST]]
        backed = next((page for page in pages if page.has(DISK)), None)
        if backed is None:
            idle = self._idle.oldest(HOST)
            if idle is not None and disk.num_free and not self._writes_paused:
                self._write_to_disk([idle])
            elif idle is not None:
                self._drop(idle, HOST)
                return True
            if self._writes_paused and not self._disk_writes and self._refusals < MAX_REFUSALS:
                oldest = self._idle.oldest(DISK)
                if oldest is not None:  # its room may do, though the disk takes no more
                    self._drop(oldest, DISK)
            if disk.num_slots and not self._writes_paused:
                self._write_to_disk(pages)
            if self._disk_writes:
                return False
            backed = next((page for page in pages if page.has(DEVICE)), None)
        if backed is None and self._in_flight:
            return False
        if backed is None:
            raise CapacityError(
                f"device, host and disk hold {[slots.num_used for slots in self.slots]} KV pages of "
                f"{[slots.num_slots for slots in self.slots]} and have no room for another{self.disk_refusal}; raise "
                "host_kv_bytes or disk_kv_bytes, or make room on the disk"
            )
        self._drop(backed, HOST)
        if backed.slots[DISK] is None:
            self._unspilled.append(backed)
        return True

    def _spill(self) -> None:
        """Starts copies of full pages to the host, as far as it has room or idle pages to give up."""
        while self._unspilled:
            page = self._unspilled[0]
            if page.has(DEVICE) and page.slots[HOST] is None and not page.has(DISK):
                if not self.slots[HOST].num_free and not self._give_up_on_host(page):
                    return
                self._start(page, DEVICE, HOST)
            self._unspilled.popleft()

    def _give_up_on_host(self, page: Page) -> bool:
        """Drops the host copy of an idle page in favour of another page's, if that loses nothing: it lies on disk, or
        on the device and will never be written to disk."""
        idle = self._idle.oldest(HOST, saved_in=(DISK,))
        if idle is None:
            oldest = self._idle.oldest(HOST, saved_in=(DEVICE,))
            if oldest is not None and (self._writes_paused or self._is_outlived(oldest)):
                idle = oldest
        if idle is not None:
            self._drop(idle, HOST)
        return idle is not None

    def _save(self) -> None:
        """Starts writing named pages to disk, so that later processes find them."""
        room = MAX_DISK_WRITES - len(self._disk_writes)
        while self._unsaved and room > 0 and not self._writes_paused:
            page = self._unsaved.popleft()
            if page.has(HOST) and self._is_to_save(page) and self._make_disk_room(page) and page.has(HOST):
                self._start(page, HOST, DISK)
                room -= 1

    def _is_outlived(self, page: Page) -> bool:
        """Whether the disk has no room for an idle page: it is full of pages that are held or were used later."""
        oldest = self._idle.oldest(DISK)
        return not self.slots[DISK].num_free and (oldest is None or oldest.stamp > page.stamp)

    def _make_disk_room(self, page: Page) -> bool:
        if self.slots[DISK].num_free:
            return True
        oldest = self._idle.oldest(DISK)
        if oldest is None or (page.is_idle and oldest.stamp > page.stamp):
            return False
        self._drop(oldest, DISK)
        return True

    def _empty_host(self, wanted: int) -> None:
        """Frees host slots until `wanted` are free: drops what is on disk, and writes the oldest of the others."""
        host = self.slots[HOST]
        in_order = [page for page in self._idle.pages(HOST) + list(self._full[HOST]) if not page.reading[HOST]]
        for page in in_order:
            if host.num_free >= wanted:
                break
            if page.has(HOST) and (page.has(DISK) or (page.is_idle and self._is_outlived(page))):
                self._drop(page, HOST)
        if host.num_free >= wanted:
            self._emptying_host = False
        elif not self._writes_paused and host.num_free + len(self._disk_writes) < wanted:
            self._write_to_disk(page for page in in_order if page.has(HOST))

    def _write_to_disk(self, pages: Iterable[Page]) -> None:
        """Starts writing the first of `pages` that have no copy there, as far as slots and MAX_DISK_WRITES allow."""
        room = MAX_DISK_WRITES - len(self._disk_writes)
        for page in pages:
            if room <= 0:
                return
            if page.slots[DISK] is None:
                if not self.slots[DISK].num_free and not self._reclaim_disk_slot():
                    return
                if page.has(HOST):  # else it followed the one that gave up its slot
                    self._start(page, HOST, DISK)
                    room -= 1

    def _reclaim_disk_slot(self) -> bool:
        """Drops the disk copy of the least recently used idle page, or of a page that lies further up as well."""
        page = self._idle.oldest(DISK) or next(
            (page for page in self._full[DISK] if not page.reading[DISK] and (page.has(HOST) or page.has(DEVICE))),
            None,
        )
        if page is not None:
            self._drop(page, DISK)
        return page is not None

    def _has_room_above(self, tier: Tier) -> bool:
        """Whether more than twice the room that must be free in a tier is free, or may be freed for a page."""
        room = self.slots[tier].num_free + self._idle.count(tier) + (len(self._parked) if tier is DEVICE else 0)
        return room > 2 * self._low[tier]

    def _make_room_above(self, tier: Tier, page: Page) -> bool:
        """Sees to a free slot in a tier to bring a page up; what gives way must lie below already."""
        if not self._has_room_above(tier):
            return False
        if self.slots[tier].num_free > 2 * self._low[tier]:
            return True
        below = (HOST, DISK) if tier is DEVICE else (DISK,)
        victim = self._idle.oldest(tier, saved_in=below)
        if victim is not None and page.is_idle and victim.stamp > page.stamp:
            victim = None
        if victim is None and tier is DEVICE and page.references:
            parked = (one for one in self._parked if not one.reading[DEVICE])
            victim = next((one for one in parked if one.has(HOST) or one.has(DISK)), None)
        if victim is not None:
            self._drop(victim, tier)
        return victim is not None
