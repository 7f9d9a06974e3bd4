"""What leaves the device when a step needs its room, and where it goes."""

from collections.abc import Iterator, Mapping
from itertools import chain

from distkv.storage.errors import CapacityError
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.shares import one_of
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.ledger.write_back import MAX_DISK_WRITES, WriteBack
from distkv.storage.tier import DEVICE, DISK, HOST


class Eviction:
    """Makes room at once, or says that transfers must end first."""

    def __init__(self, ledger: TierLedger, write_back: WriteBack):
        self._ledger = ledger
        self._write_back = write_back

    def reserve(self, count: int, coming: Mapping[bytes, int]) -> bool:
        """See `TieredCache.reserve`."""
        return self._ledger.make_room(DEVICE, self._victims(count), count, coming)

    def _victims(self, count: int) -> Iterator[Page]:
        """Pages whose device copy may go, the first to go first, each safe below when it comes. They end when transfers
        must end first. Raises CapacityError when nothing can go, nor will be able to."""
        ledger = self._ledger
        while True:
            page = ledger.idle.surplus(DEVICE, unread=False)
            if page is None and (held := self._surplus()) is not None:
                yield held
                continue
            page = page or ledger.idle.oldest(DEVICE, unread=False)
            if page is not None:
                self._keep_idle(page)
                yield page
                continue
            page = next(self._held_in_order(), None)
            if page is None:
                if ledger.transfers.under_way:
                    return
                device = ledger.slots[DEVICE]
                raise CapacityError(
                    f"{count} device pages are needed in a step, {device.num_free} of {device.num_slots} are free and "
                    "the others are being written; raise device_kv_bytes, or lower max_num_seqs or "
                    "max_num_batched_tokens"
                )
            try:
                if not self._keep_held(page):
                    return
            except CapacityError:  # nothing moves any more; of a page that is on disk the device copy can still go
                page = next((one for one in ledger.full[DEVICE] if one.has(DISK)), None)
                if page is None:
                    raise
            yield page

    def _surplus(self) -> Page | None:
        """A held page of a tenant with more than its share, safe below; None where that would take transfers first."""
        shares = self._ledger.shares
        page = shares.surplus(DEVICE, (HOST, DISK)) or shares.surplus(DEVICE, unread=False)
        try:
            return page if page is not None and self._keep_held(page) else None
        except CapacityError:
            return None

    def _held_in_order(self) -> Iterator[Page]:
        """Held pages whose device copy may go, the first to go first."""
        yield from self._ledger.held.parked
        if self._ledger.host_share:
            below = (page for page in self._ledger.full[DEVICE] if page.slots[HOST] is not None or page.has(DISK))
            yield from filter(self._ledger.is_hosts, below)
        yield from (page for page in self._ledger.full[DEVICE] if page.index)
        yield from self._ledger.full[DEVICE]

    def _keep_idle(self, page: Page) -> None:
        """Copies an idle page that lies on the device alone to the host, where others matter less; else it is about to
        be forgotten."""
        ledger = self._ledger
        ledger.force(page)
        if page.has(HOST) or page.has(DISK):
            return
        if ledger.make_room(HOST, self._unused_for_longer(page), coming=one_of(page)) and page.has(DEVICE):
            ledger.start(page, DEVICE, HOST)
            ledger.force(page)

    def _keep_held(self, page: Page) -> bool:
        """Sees to a copy below the device; False when transfers must end first."""
        if page.slots[HOST] is None and not page.has(DISK):
            if not self._make_host_room(page):
                return False
            self._ledger.start(page, DEVICE, HOST)
        self._ledger.force(page)
        return page.slots[DEVICE] is None or page.has(HOST) or page.has(DISK)

    def _make_host_room(self, page: Page) -> bool:
        """Frees a host slot for a held page; False when transfers must end first. Raises CapacityError when it cannot
        be done."""
        ledger = self._ledger
        if ledger.make_room(HOST, self._replaceable_on_host(page.tenant), coming=one_of(page)):
            return True
        if ledger.shares.is_full(HOST, page.tenant):  # its tenant's own go to disk, if they can, before others give way
            self._write_back.write(ledger.shares.unwritten(page.tenant, MAX_DISK_WRITES))
            if ledger.transfers.disk_writes:
                return False
            if ledger.make_room(HOST, self._replaceable_on_host(None), coming=one_of(page)):
                return True
        pages = [page for page in ledger.full[HOST] if not page.reading[HOST]]
        idle = ledger.idle.oldest(HOST)
        self._write_back.write(pages if idle is None else chain([idle], pages))
        if ledger.transfers.disk_writes:
            return False
        on_device = next((page for page in pages if page.has(DEVICE)), None)
        if on_device is not None:
            ledger.drop(on_device, HOST)
            self._write_back.spill_later(on_device)
            return True
        if ledger.transfers.under_way:
            return False
        raise CapacityError(
            f"device, host and disk hold {[slots.num_used for slots in ledger.slots]} KV pages of "
            f"{[slots.num_slots for slots in ledger.slots]} and have no room for another{ledger.refusals.remark}; "
            "raise host_kv_bytes or disk_kv_bytes, or make room on the disk"
        )

    # --- who gives way on the host ---

    def _unused_for_longer(self, page: Page) -> Iterator[Page]:
        """Pages whose host copies go for that of another, idle one, the first to go first: an idle one that lies
        elsewhere too, a held one that does and is of a tenant with more than its share, an idle one of such a tenant,
        one that was not used for longer. A page of such a tenant takes the place of idle pages like it alone."""
        ledger = self._ledger
        is_over = ledger.shares.is_over(HOST, page.tenant)
        find = ledger.idle.surplus if is_over else ledger.idle.oldest
        saved = find(HOST, saved_in=(DEVICE, DISK))
        if saved is not None:
            yield saved
        held = None if is_over else ledger.shares.surplus(HOST, (DEVICE, DISK))
        if held is not None:
            yield held
        oldest = find(HOST)
        if oldest is not None and (oldest.stamp <= page.stamp or ledger.shares.is_over(HOST, oldest.tenant) > is_over):
            yield oldest

    def _replaceable_on_host(self, tenant: bytes | None) -> Iterator[Page]:
        """Pages whose host copies go for that of a held one, the first to go first: an idle or held one that lies
        elsewhere too and is of a tenant with more than its share, an idle one that lies elsewhere too, a held one that
        lies on disk, an idle one that the disk has no room for.

        Args:
            tenant: whose the page is, for which others than such tenants are not to give way if it is one of them.
        """
        ledger = self._ledger
        surplus = ledger.idle.surplus(HOST, (DEVICE, DISK)) or ledger.shares.surplus(HOST, (DEVICE, DISK))
        if surplus is None and not ledger.slots[DISK].num_free:
            surplus = ledger.idle.surplus(HOST)
        if surplus is not None:
            yield surplus
        if ledger.shares.is_over(HOST, tenant):
            return
        saved = ledger.idle.oldest(HOST, saved_in=(DEVICE, DISK))
        if saved is not None:
            yield saved
        yield from (page for page in ledger.full[HOST] if not page.reading[HOST] and page.has(DISK))
        oldest = ledger.idle.oldest(HOST)
        if oldest is not None and not ledger.slots[DISK].num_free:
            yield oldest
