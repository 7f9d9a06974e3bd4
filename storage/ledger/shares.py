"""How much of device and host the pages of each tenant have, where no tenant may have more than a share of them.

A share is no wall: pages of a tenant may have more than its share of a tier while nobody else wants the room. But they
are the first to go then, whoever needs it: its idle pages, the ones used longest ago first, and held ones, the oldest
first, that lie elsewhere too. So a page of a tenant that keeps to its share makes room for no page of one that does
not. What running requests may hold in all is bounded when they are admitted, see `PagePromises`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

from distkv.storage.ledger.page import Page
from distkv.storage.tier import DEVICE, DISK, HOST, Tier

MAX_LOOKS = 4  # at held pages of a tenant for one that may go: those in front are the first to have copies elsewhere


class Shares:
    """Slots by tier and tenant. A page without a tenant, which an earlier process has left on disk, counts as nobody's
    until a request takes it up.

    Each verb has one that closes it:

    - `take`, `free`: a slot is the page's.
    - `enter`, `leave`: a held page, which is full, has a whole copy in a tier.
    - `hold`, `let_go`: the page has a holder.
    """

    def __init__(self, num_pages: tuple[int, int, int], share: float | None):
        """
        Args:
            share: of a tier's slots, above 0 and below 1; None for no limit, and then nothing is counted.
        """
        self.is_on = share is not None
        self._most = {tier: int((share or 0) * num_pages[tier]) for tier in (DEVICE, HOST)}  # slots of a tenant
        self._used: dict[Tier, dict[bytes, int]] = {DEVICE: {}, HOST: {}}
        self._over: dict[Tier, dict[bytes, None]] = {DEVICE: {}, HOST: {}}  # tenants with more than `_most`
        self._coming: dict[Tier, Mapping[bytes, int]] = {DEVICE: {}, HOST: {}}  # slots that are about to be taken
        # by tenant, tier and whether they are first pages of sequences; oldest first
        self._held: dict[tuple[bytes, Tier, bool], dict[Page, None]] = {}
        self._num_held: dict[bytes, int] = {}

    @property
    def num_slots(self) -> int:
        """What a tenant may have of device and host together."""
        return sum(self._most.values())

    def num_held(self, tenant: bytes) -> int:
        """Distinct pages that sequences of a tenant hold."""
        return self._num_held.get(tenant, 0)

    def is_full(self, tier: Tier, tenant: bytes | None, more: int = 1) -> bool:
        """Whether a tenant would have more than its share with so many slots more."""
        if not self.is_on or tenant is None or tier is DISK:
            return False
        return self._used[tier].get(tenant, 0) + more > self._most[tier]

    def over(self, tier: Tier) -> Iterator[bytes]:
        """The tenants with more than their share, counting what is coming."""
        if not self.is_on or tier is DISK:
            return
        yield from list(self._over[tier])
        for tenant, count in self._coming[tier].items():
            if tenant not in self._over[tier] and self.is_full(tier, tenant, count):
                yield tenant

    def excess(self, tier: Tier, tenant: bytes) -> int:
        """Slots of one of `over` beyond its share."""
        coming = self._coming[tier].get(tenant, 0)
        return self._used[tier].get(tenant, 0) + coming - self._most[tier]

    def is_over(self, tier: Tier, tenant: bytes | None) -> bool:
        """Whether a tenant is one of `over`."""
        return tenant is not None and tier is not DISK and self.is_full(tier, tenant, self._coming[tier].get(tenant, 0))

    @contextmanager
    def expecting(self, tier: Tier, coming: Mapping[bytes, int]) -> Iterator[None]:
        """Counts slots by tenant that are about to be taken, for as long as this lasts."""
        if not self.is_on or tier is DISK:
            yield
            return
        before, self._coming[tier] = self._coming[tier], coming
        try:
            yield
        finally:
            self._coming[tier] = before

    def surplus(self, tier: Tier, saved_in: tuple[Tier, ...] = (), unread: bool = True) -> Page | None:
        """The oldest held page of a tenant with more than its share. The arguments are those of `IdlePages.oldest`."""
        for tenant in self.over(tier):
            for page in islice(self.held(tier, tenant), MAX_LOOKS):
                is_saved = not saved_in or any(page.has(other) for other in saved_in)
                if is_saved and not (unread and page.reading[tier]):
                    return page
        return None

    def held(self, tier: Tier, tenant: bytes) -> Iterator[Page]:
        """The held pages of a tenant with a copy in a tier, the first to go first; none may come or go meanwhile."""
        for is_first in (False, True):
            yield from self._held.get((tenant, tier, is_first), ())

    def unwritten(self, tenant: bytes | None, most: int) -> list[Page]:
        """The first of them on the host that are neither on disk nor read, so many at most."""
        pages = () if tenant is None else self.held(HOST, tenant)
        return list(islice((page for page in pages if page.slots[DISK] is None and not page.reading[HOST]), most))

    def take(self, page: Page, tier: Tier) -> None:
        self._count(page, tier, 1)

    def free(self, page: Page, tier: Tier) -> None:
        self._count(page, tier, -1)

    def enter(self, page: Page, tier: Tier) -> None:
        if self.is_on and page.tenant is not None and tier is not DISK:
            self._held.setdefault((page.tenant, tier, not page.index), {})[page] = None

    def leave(self, page: Page, tier: Tier) -> None:
        """Nothing to do for a page that has not entered."""
        if self.is_on and page.tenant is not None:
            key = page.tenant, tier, not page.index
            if page in self._held.get(key, ()):
                del self._held[key][page]
                if not self._held[key]:
                    del self._held[key]

    def hold(self, page: Page) -> None:
        if self.is_on and page.tenant is not None:
            self._num_held[page.tenant] = self._num_held.get(page.tenant, 0) + 1

    def let_go(self, page: Page) -> None:
        if self.is_on and page.tenant is not None:
            _add(self._num_held, page.tenant, -1)

    def integrity_check(self, pages: set[Page]) -> None:
        """Raises AssertionError when the counts do not fit these pages, which are all."""
        if not self.is_on:
            return
        for tier in (DEVICE, HOST):
            used: dict[bytes, int] = {}
            for page in pages:
                if page.tenant is not None and page.slots[tier] is not None:
                    used[page.tenant] = used.get(page.tenant, 0) + 1
            assert used == self._used[tier]
            assert set(self._over[tier]) == {one for one, count in used.items() if count > self._most[tier]}
            entered = {page for page in pages if not page.is_idle and page.full and page.has(tier)}
            listed = {page for (_, where, _), held in self._held.items() if where is tier for page in held}
            assert listed == {page for page in entered if page.tenant is not None}
        held = [page.tenant for page in pages if page.references and page.tenant is not None]
        assert self._num_held == {tenant: held.count(tenant) for tenant in held}
        assert not any(self._coming.values()) and all(self._held.values())

    def _count(self, page: Page, tier: Tier, change: int) -> None:
        if not self.is_on or page.tenant is None or tier is DISK:
            return
        _add(self._used[tier], page.tenant, change)
        if self.is_full(tier, page.tenant, 0):
            self._over[tier][page.tenant] = None
        else:
            self._over[tier].pop(page.tenant, None)


def one_of(page: Page) -> dict[bytes, int]:
    """A slot that is coming for a page."""
    return {} if page.tenant is None else {page.tenant: 1}


def _add(counts: dict[bytes, int], tenant: bytes, change: int) -> None:
    """Changes a count; one of 0 is not kept, since tenants may be many over time."""
    counts[tenant] = counts.get(tenant, 0) + change
    if not counts[tenant]:
        del counts[tenant]
