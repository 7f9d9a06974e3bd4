"""Which page of the KV cache lies where: the policy of the tiers. Plain bookkeeping on the leader, without a tensor.

A full page is written through to the host when it fills, which makes its eviction from the device a drop. Held pages
leave device and host oldest first, but for the first page of a sequence: what is left is the first page, the newest
ones and as much of the middle as fits, and it stays so while a sequence is scanned. Where the host is nearly full, its
oldest pages are written to disk ahead of need.

Idle pages give way before held ones, least recently used first; they never count against the room that a request may
be promised. Those with a key are written to disk for later processes.

What leaves the device is in `eviction.py`, what goes down ahead of need in `write_back.py`, what comes up again in
`promotion.py`.
"""

from collections.abc import Iterable, Mapping

from distkv.storage.ledger.eviction import Eviction
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.promotion import Promotion
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.ledger.write_back import WriteBack
from distkv.storage.tier import DEVICE, DISK, HOST, Tier, Transfer


class TieredCache:
    """The pages of all sequences over `num_pages` slots per tier (device, host, disk; 0 for a tier that is off).

    Each verb has one that closes it:

    - `allocate`, `share`: `release`. In between the page is held, and lies somewhere unless it is in `lost`.
    - `restore` a lost page: `fill`, or `forget` when that fails.
    - `park`: `unpark`.
    - `take_transfers`, `take_relocated`, `take_new`: `put_back`, if the plan may not have reached the ranks; else
      `apply`.

    Device slots are taken in `allocate`, after `reserve` has made room. Everything else that moves is queued for the
    next step plan (`take_transfers`), and `apply` takes in that it has ended.
    """

    def __init__(
        self,
        num_pages: tuple[int, int, int],
        step_pages: int,
        write_through: bool = False,
        share: float | None = None,
        host_share: float = 0.0,
    ):
        """
        Args:
            step_pages: device pages that a step may fill at most; twice as many are kept free on device and, if it is
                large enough, host before pages are brought back up.
            write_through: pages with a key are written to disk as soon as they are full, not only when they are idle.
            share: of device and host that a tenant may have, see `Shares`.
            host_share: of each sequence's pages that tokens of answers meet on the host: they leave the device first,
                and are not brought up there.
        """
        low = step_pages, min(step_pages, max(1, num_pages[HOST] // 4))  # free slots that device and host need
        ledger = self._ledger = TierLedger(num_pages, write_through, share, host_share)
        self._held, self._transfers, self._refusals = ledger.held, ledger.transfers, ledger.refusals
        self._write_back = WriteBack(ledger, low[HOST])
        self._eviction = Eviction(ledger, self._write_back)
        self._promotion = Promotion(ledger, low)
        self.slots = ledger.slots
        self.index = ledger.index
        self.journal = ledger.journal  # for the catalogue of the disk tier; somebody must take it with every plan
        self.lost = ledger.held.lost  # pages that a sequence holds and no tier does

    @property
    def num_pages(self) -> int:
        """Distinct pages that sequences hold."""
        return len(self._held)

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds and a later request may find."""
        return self._ledger.num_idle

    def num_idle_in(self, tier: Tier) -> int:
        """The same, as far as they lie in a tier."""
        return self._ledger.idle.count(tier)

    @property
    def num_unsaved(self) -> int:
        """Pages that a later process would find if they were on disk. Looks at all that have a key."""
        return sum(not page.has(DISK) for page in self.index) if self.slots[DISK].num_slots else 0

    @property
    def num_to_save(self) -> int:
        """Pages that are on their way to disk, or go there by themselves as soon as they may."""
        ledger = self._ledger
        queued = len(ledger.unspilled) + len(ledger.unsaved) + len(self._transfers.disk_writes)
        return queued if self.slots[DISK].num_slots else 0

    @property
    def capacity(self) -> int:
        """Distinct pages that sequences may hold: all slots, unless the disk refuses more than it holds."""
        return self.slots[DEVICE].num_slots + self.slots[HOST].num_slots + self._disk_capacity

    @property
    def has_shares(self) -> bool:
        """Whether tenants have shares of device and host."""
        return self._ledger.shares.is_on

    @property
    def share_capacity(self) -> int:
        """Distinct pages that sequences of one tenant may hold."""
        shares = self._ledger.shares
        return shares.num_slots + self._disk_capacity if shares.is_on else self.capacity

    def num_pages_of(self, tenant: bytes | None) -> int:
        """Distinct pages that sequences of a tenant hold, where there are shares."""
        return 0 if tenant is None else self._ledger.shares.num_held(tenant)

    def may_come_up(self, tenant: bytes | None) -> bool:
        """Whether `promote` may bring pages of a tenant up."""
        shares, held = self._ledger.shares, self._held
        on_disk = held.num_above_disk < len(held)
        return not shares.is_full(DEVICE, tenant) or (on_disk and not shares.is_full(HOST, tenant))

    @property
    def _disk_capacity(self) -> int:
        disk = self.slots[DISK]
        if not self._refusals.paused:
            return disk.num_slots
        return disk.num_used + disk.num_free - (self._ledger.idle.count(DISK) if self._refusals.hopeless else 0)

    @property
    def disk_refusal(self) -> str:
        """A remark on why the disk takes no more pages; empty when it does."""
        return self._refusals.remark

    @property
    def has_cold(self) -> bool:
        """Whether some held page may lie below the device alone."""
        return len(self._held) > self._held.num_on_device

    @property
    def may_promote(self) -> bool:
        """Whether `promote` may find something to do among the held pages."""
        return self._promotion.may_promote

    @property
    def awaited(self) -> list[int]:
        """Transfers to wait for when `reserve` cannot go on: the oldest write to disk, or else all that are under
        way."""
        return self._transfers.disk_writes[:1] or list(self._transfers.under_way)

    # --- pages and who holds them ---

    def allocate(self, index: int, after: Page | None = None, tenant: bytes | None = None) -> Page:
        """A tenant's page to be filled, on the device, with the old content of its slot; behind page `after` where that
        is free."""
        page = Page(index, references=0, tenant=tenant)
        self._ledger.take_slot(page, DEVICE, after.slots[DEVICE] if after else None)
        self._held.add(page)
        self._ledger.shares.hold(page)
        return page

    def fill(self, page: Page, key: PageKey | None = None) -> None:
        """Takes note that a page on the device is full and its content final; under its key it may be found, unless
        another page of the same content is there already. An idle one of these gives its place to this page, with its
        copies below the device, so that what was computed again is what is found."""
        page.full = True
        if page in self.lost:
            self._held.recover(page)
            self.index.num_changes += 1
        elif key is not None:
            known = self.index.add(page, key)
            if known is not page and not self._ledger.replace(known, page):
                page.twin = known
        self._ledger.enter(page, DEVICE)
        if self.slots[HOST].num_slots:
            self._write_back.spill_later(page)

    def share(self, page: Page, tenant: bytes | None = None) -> None:
        """Adds a holder to a page that is held or idle; it is of this tenant, if nobody knew whose it is."""
        if page.references:
            self._held.unpark(page)
            page.references += 1
        else:
            assert page.is_idle
            self._ledger.wake(page)
            self._ledger.claim(page, tenant)
            self._held.add(page)
            self._ledger.shares.hold(page)

    def release(self, page: Page) -> None:
        """Drops a holder. What nobody holds is idle if it has a key, and else free once no transfer touches it."""
        if page.references > 1:
            page.references -= 1
            return
        if page in self.lost and page.key is not None:
            self._ledger.forget(page)
        if page.twin is not None:
            self.touch([page.twin])
        self._held.remove(page)
        self._ledger.shares.let_go(page)
        if page.key is None:
            self._ledger.free_unheld(page)
        else:
            self._ledger.rest(page)

    def restore(self, page: Page) -> None:
        """Gives a lost page a device slot to be filled again; `fill` must follow, or `forget`."""
        assert page.lost
        page.full = False
        self._ledger.take_slot(page, DEVICE)
        self._held.relocate(page)

    def forget(self, page: Page) -> None:
        """Takes a page back whose restoration has failed; it is as lost as before."""
        self._ledger.drop(page, DEVICE)
        page.full = True

    def park(self, pages: Iterable[Page]) -> None:
        """Lets the device copies of a waiting sequence's pages go before those of others."""
        for page in pages:
            if page.references == 1 and page.full and page.has(DEVICE):
                self._held.park(page)

    def unpark(self, pages: Iterable[Page]) -> None:
        """Ends `park`."""
        for page in pages:
            self._held.unpark(page)

    # --- pages that may be found ---

    @property
    def num_findable_changes(self) -> int:
        """A number that is another one when `find` may find something else than before."""
        return self.index.num_changes

    def find(self, keys: Iterable[PageKey]) -> list[Page]:
        """The pages of the longest prefix of a chain that can be read."""
        found = self.index.longest(keys)
        return next((found[:number] for number, page in enumerate(found) if page.lost), found)

    def is_held(self, key: PageKey) -> bool:
        """Whether a sequence holds the page that is found by a key."""
        page = self.index.get(key)
        return page is not None and page.references > 0

    def touch(self, pages: list[Page], tenant: bytes | None = None) -> None:
        """Makes idle pages of one prefix the most recently used, for a request of a tenant that is about to take them
        up."""
        for page in reversed(pages):
            if page.is_idle:
                self._ledger.wake(page)
                self._ledger.claim(page, tenant)
                self._ledger.rest(page)

    def adopt(self, entries: Iterable[tuple[int, int, PageKey]]) -> None:
        """Takes in pages that an earlier process left on disk, as (slot, index, key), least recently used first."""
        for slot, index, key in entries:
            page = Page(index, references=0, full=True)
            if self.index.add(page, key) is page:
                self.slots[DISK].take(slot)
                page.set_slot(DISK, slot)
                self._ledger.rest(page)
        self.journal.forget_uses()

    def make_disk_room(self, count: int) -> list[int]:
        """So many free slots of the disk, or as many as there are when idle pages on it have given way, those used
        longest ago first. They are to be filled, and given to `adopt`, before anything else is done with the cache, or
        to `leave_empty`."""
        victims = iter(lambda: self._ledger.idle.oldest(DISK), None)
        self._ledger.make_room(DISK, victims, count)
        return self._ledger.disk_slots.next_free(count)

    def leave_empty(self, slots: Iterable[int]) -> None:
        """Takes note that free slots of the disk have no files any more."""
        for slot in slots:
            self._ledger.disk_slots.forget_files(slot)

    def reset(self) -> None:
        """Forgets all keys, so that nothing is found any more; idle pages are free once no transfer touches them."""
        for page in self.index:
            slot = page.slots[DISK]
            if page.has(DISK) and slot is not None:
                self.journal.vacate(slot)
            if page.key is not None:  # else it went with one before it
                self._ledger.forget(page)
        self.journal.forget_uses()

    # --- room ---

    def reserve(self, count: int, coming: Mapping[bytes, int] | None = None) -> bool:
        """Makes `count` device slots free. False: transfers must end first; run a plan that waits for `awaited`, and
        ask again. Raises CapacityError when no tier has room for what must leave the device.

        Args:
            coming: how many of them each tenant is to get.
        """
        return self._eviction.reserve(count, coming or {})

    def balance(self) -> None:
        """Queues write-through to the host and to disk, and writes to disk while the host is nearly full."""
        self._write_back.balance()

    def promote(self, cold: Iterable[Page]) -> None:
        """Queues bringing pages up to stay, in the order given, while a tier has more than twice the room that must be
        free, counting what it may give up for them."""
        self._promotion.promote(cold)

    def retry_disk(self) -> None:
        """Lets the disk be tried again before its time."""
        self._refusals.lift()

    # --- plans and what became of them ---

    def take_transfers(self) -> tuple[list[Transfer], list[int]]:
        """What the next plan has to start, and the ids that it must see ended before it touches pages."""
        return self._transfers.take()

    def take_relocated(self) -> list[Page]:
        """Held pages that lie elsewhere than the ranks know; to be sent with the next plan that reads pages."""
        return self._held.take_relocated()

    def take_new(self, relocated: Iterable[Page]) -> list[Page]:
        """Those of the relocated pages whose ids named other pages before, or none; to be sent with them."""
        return self._held.take_new(relocated)

    def hosts_of(self, relocated: Iterable[Page]) -> list[tuple[int, int]]:
        """`StepPlan.host_pages` of some pages."""
        mine = (page for page in relocated if self._ledger.is_hosts(page))
        return [(page.id, -1 if (slot := page.slots[HOST]) is None or not page.has(HOST) else slot) for page in mine]

    def put_back(self, transfers: list[Transfer], wait: list[int], relocated: Iterable[Page] = ()) -> None:
        """Undoes the takings for a plan that may not have reached the ranks; they pass over what they know."""
        self._transfers.put_back(transfers, wait)
        self._held.put_back(relocated)

    def apply(self, done: Iterable[int], failed: Iterable[tuple[int, str]], bad_reads: Iterable[int]) -> set[Page]:
        """Takes in what the ranks report of the plan that ended last.

        Args:
            done, failed: ids of transfers; a failure comes with its reason.
            bad_reads: disk slots whose content the plan's step could not read.

        Returns the held pages of `bad_reads`. Those that lie nowhere else are in `lost` now, and so are those that a
        failed transfer could not read.
        """
        for id in done:
            self._ledger.finish(id)
        damaged = {page for id, reason in failed if (page := self._ledger.fail(id, reason)) is not None}
        unread = self._ledger.take_owners(set(bad_reads))
        for page in damaged | unread:
            if page.has(DISK) and not page.reading[DISK]:
                self._ledger.drop(page, DISK)
                self._write_back.spill_later(page)
            if page.references and page.lost:
                self._held.lose(page)
                self.index.num_changes += 1
        return unread

    def integrity_check(self) -> None:
        """Raises AssertionError when slots, pages and transfers do not add up."""
        self._ledger.integrity_check()
