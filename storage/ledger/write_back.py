"""What goes down before its room is needed: write-through to host and disk, and what a nearly full host holds."""

from collections import deque
from collections.abc import Iterable, Iterator

from distkv.storage.ledger.page import Page
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
        self._unspilled: deque[Page] = deque()  # full, on the device alone
        self._put_off: dict[Page, None] = {}  # those to be saved when the disk takes more
        self._emptying_host = False

    def spill_later(self, page: Page) -> None:
        """Has a full page on the device copied to the host when it has room."""
        self._unspilled.append(page)

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
        while self._unspilled:
            page = self._unspilled[0]
            if page.has(DEVICE) and page.slots[HOST] is None and not page.has(DISK):
                if not self._ledger.make_room(HOST, self._dispensable_on_host()):
                    return
                self._ledger.start(page, DEVICE, HOST)
            self._unspilled.popleft()

    def _save(self) -> None:
        """Starts writing pages with keys to disk, so that later processes find them."""
        ledger = self._ledger
        if not ledger.refusals.paused:
            ledger.unsaved.extend(self._put_off)
            self._put_off.clear()
        room = self._num_writes_left()
        while ledger.unsaved and room > 0 and not ledger.refusals.hopeless:
            page = ledger.unsaved.popleft()
            if not (page.has(HOST) and ledger.needs_saving(page)):
                continue
            if not ledger.make_room(DISK, self._outlived_on_disk(page)):
                if ledger.refusals.paused:
                    self._put_off[page] = None
            elif page.has(HOST):
                ledger.start(page, HOST, DISK)
                room -= 1

    def _empty_host(self, wanted: int) -> None:
        """Frees host slots until `wanted` are free: drops what is on disk, and writes the oldest of the others."""
        ledger, host = self._ledger, self._ledger.slots[HOST]
        in_order = [page for page in ledger.idle.pages(HOST) + list(ledger.full[HOST]) if not page.reading[HOST]]
        victims = (
            page for page in in_order
            if page.has(HOST) and (page.has(DISK) or (page.is_idle and self._is_disk_full_for(page)))
        )  # fmt: skip
        if ledger.make_room(HOST, victims, wanted):
            self._emptying_host = False
        elif host.num_free + len(ledger.transfers.disk_writes) < wanted:
            self.write(page for page in in_order if page.has(HOST))

    def _num_writes_left(self) -> int:
        under_way = len(self._ledger.transfers.disk_writes)
        if under_way and self._ledger.refusals.paused:
            return 0  # those that began before may take the room of a page that is given up now
        return MAX_DISK_WRITES - under_way

    # --- who gives way ---

    def _dispensable_on_host(self) -> Iterator[Page]:
        """Idle pages whose host copies may go for that of another page, the first to go first, since nothing is lost:
        one that lies on disk, one that lies on the device and will never be written to disk."""
        ledger = self._ledger
        on_disk = ledger.idle.oldest(HOST, saved_in=(DISK,))
        if on_disk is not None:
            yield on_disk
        on_device = ledger.idle.oldest(HOST, saved_in=(DEVICE,))
        if on_device is not None and self._is_disk_full_for(on_device):
            yield on_device

    def _outlived_on_disk(self, page: Page) -> Iterator[Page]:
        """The idle page on disk that goes for one which is held or was used later."""
        oldest = self._oldest_on_disk()
        if oldest is not None and not (page.is_idle and oldest.stamp > page.stamp):
            yield oldest

    def _is_disk_full_for(self, page: Page) -> bool:
        """Whether the disk is full of pages that are held or were used later than an idle page."""
        return not self._ledger.slots[DISK].num_free and next(self._outlived_on_disk(page), None) is None

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
