"""What goes down before its room is needed: write-through to host and disk, and what a nearly full host holds."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.shares import one_of
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.tier import DEVICE, DISK, HOST

MAX_DISK_WRITES = 4  # pages on their way to disk at a time


class WriteBack:
    """Copies from device to host, and from host to disk."""

    def __init__(self, ledger: TierLedger, low: int):
        """
        Args:
            low: free host slots under which pages are written to disk, until twice as many are free.
        """
        self._ledger = ledger
        self._low = low
        self._emptying_host = False

    def spill_later(self, page: Page) -> None:
        """Has a full page copied from the device, if it lies there, to the host when it has room."""
        if page.has(DEVICE):
            self._ledger.unspilled[page] = None

    def balance(self) -> None:
        """See `TieredCache.balance`; to be called once a step."""
        self._ledger.refusals.count_step()
        self._spill()
        host, disk = self._ledger.slots[HOST], self._ledger.slots[DISK]
        if not disk.num_slots:
            return
        self._save()
        if host.num_free < self._low:
            self._emptying_host = True
        if self._emptying_host:
            self._empty_host(min(2 * self._low, host.num_slots))

    def write(self, pages: Iterable[Page]) -> None:
        """Starts writing the first of `pages` that have no copy there to disk, as far as slots and MAX_DISK_WRITES
        allow."""
        room = self._num_writes_left()
        for page in pages:
            if room <= 0:
                return
            if page.slots[DISK] is None:
                if not self._ledger.make_room(DISK, self._dispensable_on_disk()):
                    return
                if page.has(HOST):  # else it followed the one that gave up its slot
                    self._ledger.start(page, HOST, DISK)
                    room -= 1

    def _spill(self) -> None:
        """Starts copies of full pages to the host, as far as it has room or idle pages to give up."""
        unspilled = self._ledger.unspilled
        while unspilled:
            page = next(iter(unspilled))
            if page.slots[HOST] is None:
                if self._ledger.make_room(HOST, self._dispensable_on_host(page), coming=one_of(page)):
                    self._ledger.start(page, DEVICE, HOST)
                elif not self._ledger.shares.is_full(HOST, page.tenant):
                    return  # else those of other tenants need not wait for it
            unspilled.pop(page, None)

    def _save(self) -> None:
        """Starts writing pages with keys to disk, so that later processes find them."""
        ledger = self._ledger
        for page in list(islice(ledger.put_off, ledger.slots[DISK].num_free)):
            del ledger.put_off[page]
            ledger.unsaved[page] = None
        room = self._num_writes_left()
        while ledger.unsaved and room > 0 and not ledger.refusals.hopeless:
            page = next(iter(ledger.unsaved))
            if page.has(HOST) and ledger.needs_saving(page):
                if ledger.make_room(DISK, self._outlived_on_disk(page)):
                    if page.has(HOST):  # else it followed the one that gave up its slot
                        ledger.start(page, HOST, DISK)
                        room -= 1
                elif self._oldest_on_disk() is None:  # all there are held
                    return
                else:
                    ledger.put_off[page] = None
            ledger.unsaved.pop(page, None)

    def _empty_host(self, wanted: int) -> None:
        """Frees host slots until `wanted` are free: drops what is on disk, and writes the oldest of the others."""
        ledger, host = self._ledger, self._ledger.slots[HOST]
        victims = (page for page in self._unread_on_host(wanted) if page.has(DISK) or self._is_disk_full_for(page))
        if ledger.make_room(HOST, list(islice(victims, max(0, wanted - host.num_free))), wanted):
            self._emptying_host = False
        elif host.num_free + len(ledger.transfers.disk_writes) < wanted:
            unwritten = (page for page in self._unread_on_host(wanted) if page.slots[DISK] is None)
            self.write(list(islice(unwritten, MAX_DISK_WRITES)))

    def _num_writes_left(self) -> int:
        under_way = len(self._ledger.transfers.disk_writes)
        if under_way and self._ledger.refusals.paused:
            return 0  # those that began before may take the room of a page that is given up now
        return MAX_DISK_WRITES - under_way

    # --- who gives way ---

    def _unread_on_host(self, wanted: int) -> Iterator[Page]:
        """Pages that no transfer reads there, the first to go first; none may come or go meanwhile. The surplus of
        tenants with more than their share comes first, and alone where so many slots become free with it."""
        ledger, surplus = self._ledger, dict[Page, None]()
        for tenant in ledger.shares.over(HOST):
            own = chain(ledger.idle.pages_of(tenant, HOST), ledger.shares.held(HOST, tenant))
            surplus |= dict.fromkeys(islice(own, min(wanted, ledger.shares.excess(HOST, tenant))))
        pages: Iterable[Page] = surplus
        if len(surplus) < wanted - ledger.slots[HOST].num_free:
            others = chain(ledger.idle.pages(HOST), ledger.full[HOST])
            pages = chain(surplus, (page for page in others if page not in surplus))
        return (page for page in pages if not page.reading[HOST])

    def _dispensable_on_host(self, page: Page) -> Iterator[Page]:
        """Idle pages whose host copies may go for that of another page, the first to go first, since nothing is lost:
        one that lies on disk, one that lies on the device and will never be written to disk. For one of a tenant that
        would have more than its share they are that tenant's; others may take the place of its held pages that lie
        elsewhere too."""
        ledger = self._ledger
        is_over = ledger.shares.is_over(HOST, page.tenant)
        find = ledger.idle.surplus if is_over else ledger.idle.oldest
        on_disk = find(HOST, saved_in=(DISK,))
        if on_disk is not None:
            yield on_disk
        on_device = find(HOST, saved_in=(DEVICE,))
        if on_device is not None and self._is_disk_full_for(on_device):
            yield on_device
        held = None if is_over else ledger.shares.surplus(HOST, (DEVICE, DISK))
        if held is not None:
            yield held

    def _outlived_on_disk(self, page: Page) -> Iterator[Page]:
        """The idle page on disk that goes for one which is held or was used later."""
        oldest = self._oldest_on_disk()
        if oldest is not None and not (page.is_idle and oldest.stamp > page.stamp):
            yield oldest

    def _is_disk_full_for(self, page: Page) -> bool:
        """Whether a page is idle, and the disk full of others that are held or were used later."""
        return (
            page.is_idle and not self._ledger.slots[DISK].num_free and next(self._outlived_on_disk(page), None) is None
        )

    def _dispensable_on_disk(self) -> Iterator[Page]:
        """Pages whose disk copies may go, the first to go first: the least recently used idle one, those that lie
        further up as well. These stay while the disk refuses more, and may do so in the room of others."""
        idle = self._oldest_on_disk()
        if idle is not None:
            yield idle
        if self._ledger.refusals.paused:
            return
        for page in self._ledger.full[DISK]:
            if not page.reading[DISK] and (page.has(HOST) or page.has(DEVICE)):
                self.spill_later(page)  # so that it is saved again
                yield page

    def _oldest_on_disk(self) -> Page | None:
        """The idle page there that goes first; none when its room would be of no use."""
        return None if self._ledger.refusals.hopeless else self._ledger.idle.oldest(DISK)
