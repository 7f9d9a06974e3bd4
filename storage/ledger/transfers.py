"""Copies of whole pages between tiers, from the plan that starts them to the report that they have ended."""

from distkv.storage.ledger.page import Page
from distkv.storage.tier import DEVICE, DISK, HOST, Tier, Transfer


class Transfers:
    """What the next plan has to start, and what the ranks have under way while steps go on.

    Each verb has one that closes it, and something is protected in between:

    - `start`, `finish`: the source copy stays (`Page.reading`), and the target slot belongs to a copy that nobody reads
      yet (`Page.filling`); neither slot changes hands.
    - `force`, `finish`: the transfer counts as ended at once, since the next plan waits for it before it touches pages;
      from that plan on its slots may change hands. Its report may come when still later plans are prepared, and changes
      nothing any more.
    - `take`, `put_back`: what was taken is in a plan; it goes back if that plan may not have reached the ranks, which
      pass over the transfers that they know.
    """

    def __init__(self) -> None:
        self.under_way: dict[int, tuple[Transfer, Page]] = {}  # by id; those that are queued too
        self._forced: set[int] = set()  # of which no rank has said yet that they have ended
        self._queued: list[Transfer] = []
        self._wait: list[int] = []
        self._next_id = 0

    @property
    def disk_writes(self) -> list[int]:
        """Ids of the transfers to disk, the oldest first."""
        return [id for id, (transfer, _) in self.under_way.items() if transfer.target is DISK]

    def start(self, page: Page, source: Tier, target: Tier) -> None:
        """Queues the copy of a page between two slots that it has."""
        source_slot, target_slot = page.slots[source], page.slots[target]
        assert source_slot is not None and target_slot is not None
        transfer = Transfer(self._next_id, source, source_slot, target, target_slot)
        self._next_id += 1
        page.set_filling(target, transfer.id)
        page.count_reading(source, 1)
        self.under_way[transfer.id] = transfer, page
        self._queued.append(transfer)

    def force(self, page: Page) -> Transfer | None:
        """Has the next plan wait for the copy of the page from device to host, which cannot fail. Returns it, and None
        when there is none under way."""
        if not page.reading[DEVICE]:
            return None
        id = page.filling[HOST]
        assert id is not None
        self._wait.append(id)
        transfer, _ = self._close(id)
        self._forced.add(id)
        return transfer

    def finish(self, id: int) -> tuple[Transfer, Page] | None:
        """Ends a transfer that the ranks have reported; None when it was forced, so that it counts as ended already."""
        if id in self._forced:
            self._forced.remove(id)
            return None
        return self._close(id)

    def take(self) -> tuple[list[Transfer], list[int]]:
        """What the next plan has to start, and the ids that it must see ended before it touches pages."""
        taken = self._queued, self._wait
        self._queued, self._wait = [], []
        return taken

    def put_back(self, transfers: list[Transfer], wait: list[int]) -> None:
        """Undoes `take`."""
        self._queued, self._wait = transfers + self._queued, wait + self._wait

    def integrity_check(self, page: Page, tier: Tier) -> None:
        """Raises AssertionError when a copy is marked as read or filled by other transfers than are under way."""
        own = [transfer for transfer, owner in self.under_way.values() if owner is page]
        assert page.reading[tier] == sum(transfer.source is tier for transfer in own)
        filling = [transfer.id for transfer in own if transfer.target is tier]
        assert filling == ([] if page.filling[tier] is None else [page.filling[tier]])

    def _close(self, id: int) -> tuple[Transfer, Page]:
        transfer, page = self.under_way.pop(id)
        page.count_reading(transfer.source, -1)
        page.set_filling(transfer.target, None)
        return transfer, page
