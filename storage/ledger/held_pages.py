"""The pages that sequences hold, as the ranks know them: by ids, with locations that must be sent when they change."""

from collections.abc import Iterable, Iterator

from distkv.storage.ledger.page import Page
from distkv.storage.tier import DEVICE, HOST, Tier


class HeldPages:
    """All pages with a holder.

    Each verb has one that closes it, and something holds in between:

    - `add`, `remove`: the page has an id that no other has, and is counted in the tiers where it has slots.
    - `add`, `take_new`: the page's id named another one before, or none; the ranks forget what they know of that.
      `put_back` undoes the taking.
    - `relocate`, `take_relocated`: the ranks look for the page elsewhere; no plan may read it before its location was
      sent. `put_back` undoes the taking.
    - `park`, `unpark`: the sequences of the page wait, and its device copy goes before those of others.
    - `lose`, `recover`: no tier has a copy of the page, which is full.
    """

    def __init__(self) -> None:
        self.parked: dict[Page, None] = {}  # full ones on the device, in the order in which they go
        self.lost: dict[Page, None] = {}
        self.num_on_device = 0  # with a slot on the device
        self.num_above_disk = 0  # with one there or on the host
        self._pages: dict[Page, None] = {}
        self._relocated: dict[Page, None] = {}  # whose location has not been sent
        self._new: dict[Page, None] = {}  # whose id the ranks may know as another page's
        self._free_ids: list[int] = []
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages)

    def add(self, page: Page) -> None:
        """Gives a page its first holder, and an id."""
        page.references = 1
        page.repairs = 0
        self._pages[page] = None
        if self._free_ids:
            page.id = self._free_ids.pop()
        else:
            page.id = self._next_id
            self._next_id += 1
        self._count(page, 1)
        self._relocated[page] = self._new[page] = None

    def remove(self, page: Page) -> None:
        """Takes the last holder of a page."""
        assert page.references == 1
        page.references = 0
        del self._pages[page]
        self._relocated.pop(page, None)
        self._new.pop(page, None)
        self.parked.pop(page, None)
        self._free_ids.append(page.id)
        self._count(page, -1)
        self.lost.pop(page, None)

    def set_slot(self, page: Page, tier: Tier, slot: int | None) -> None:
        """Gives a page a slot, or takes it; one that nobody holds is not counted."""
        if page.references:
            self._count(page, -1)
        page.set_slot(tier, slot)
        if page.references:
            self._count(page, 1)

    def relocate(self, page: Page) -> None:
        """Notes that a page is to be read elsewhere than the ranks know, or may be."""
        self._relocated[page] = None

    def take_relocated(self) -> list[Page]:
        """The pages whose location is to be sent; a lost one comes when it has a location again."""
        taken = [page for page in self._relocated if not page.lost]
        self._relocated = {page: None for page in self._relocated if page.lost}
        return taken

    def take_new(self, relocated: Iterable[Page]) -> list[Page]:
        """Those of some pages whose ids have come to name them since they were sent last."""
        taken = [page for page in relocated if page in self._new]
        for page in taken:
            del self._new[page]
        return taken

    def put_back(self, relocated: Iterable[Page]) -> None:
        """Undoes `take_relocated` and `take_new`, as far as the pages are held still. Ranks that are told again that a
        page is new do some work once more, and no harm."""
        for page in relocated:
            if page.references:
                self._relocated[page] = self._new[page] = None

    def park(self, page: Page) -> None:
        self.parked[page] = None

    def unpark(self, page: Page) -> None:
        self.parked.pop(page, None)

    def lose(self, page: Page) -> None:
        self.lost[page] = None

    def recover(self, page: Page) -> None:
        """Notes that a lost page was computed again."""
        del self.lost[page]
        page.repairs += 1

    def integrity_check(self) -> None:
        """Raises AssertionError when ids, counts and lists do not fit the pages."""
        assert all(page.references > 0 for page in self)
        assert len({page.id for page in self} | set(self._free_ids)) == self._next_id
        assert self.num_on_device == sum(page.slots[DEVICE] is not None for page in self)
        above = sum(page.slots[DEVICE] is not None or page.slots[HOST] is not None for page in self)
        assert self.num_above_disk == above
        assert set(self.lost) == {page for page in self if page.full and page.lost}
        assert all(page.references and page.has(DEVICE) for page in self.parked)

    def _count(self, page: Page, sign: int) -> None:
        """Counts a page's slots in or out."""
        on_device = page.slots[DEVICE] is not None
        self.num_on_device += sign * on_device
        self.num_above_disk += sign * (on_device or page.slots[HOST] is not None)
