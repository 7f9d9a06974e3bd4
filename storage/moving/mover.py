"""Copies whole pages between the tiers of one rank, beside its steps.

On a GPU the device runs behind the host, by up to two steps, and so behind what the leader knows. The leader frees a
slot when nothing *it has not seen the end of* reads or fills it, with two exceptions that it cannot see: the steps
before, whose computing and streaming may go on, and spills that it awaits, which it counts as done at once. Both are
kept on the rank, where nobody on the host waits for them but threads of the disk.

The first by the *border*: all that was enqueued to be computed when a plan starts its transfers. It covers whatever the
steps before do to slots of the device, and their streamed reads of slots of the host too, since a step computes behind
all its loads (`LoadsAhead`; what a failed step did not come to take may be anything). The second by the newest copy in
each direction that touches a slot.

| slot | who changes it | who may read it or fill it still | what is waited for |
|---|---|---|---|
| device | a fetch | a step; an awaited spill | its lane: the border; the spill |
| device | a step, for a new page | an awaited spill; nothing else | what computes: the spill |
| host | a spill | a load of a step; an awaited spill | its lane: the border; they share a lane |
| host | a read from disk | the same | its thread: the border; the spill |
| disk | a write | nothing: streamed reads end on the host, before their step does | |

What is read is there: a spill waits for the border, behind which its page was computed. A fetch, a load of the staging
ring and a write to disk wait for the spill that fills their host slot (`Mover.filling`). All else was reported, so it
has ended: pages that came from disk, pages that were fetched.

To report a transfer later than it ends breaks nothing: its slots stay taken for longer. Whoever needs the report itself
sends a plan without sequences and has the host wait (`Mover.wait`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from distkv.storage.errors import StoreError
from distkv.storage.meter import Meter, now
from distkv.storage.moving.copier import Copier, LaneCopier, Task, ThreadCopier
from distkv.storage.moving.lane_times import LaneTimes
from distkv.storage.moving.link import Link
from distkv.storage.moving.page_copies import PageCopies
from distkv.storage.moving.streams import Event
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, Transfer

if TYPE_CHECKING:
    from distkv.storage.pools.disk_pool import DiskPool

DISK_THREADS = 2


@dataclass(frozen=True)
class EndedTransfers:
    """The transfers that have ended since the last report."""

    done: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)  # id and reason
    checksums: dict[int, bytes] = field(default_factory=dict)  # of pages written to disk, by id


class Mover:
    """Runs transfers asynchronously: between device and host by a `Copier`, to and from disk in threads.

    Copies between device and host cannot fail, and each sees what those of lower ids did to its slots. A device page
    that is copied must not change until its copy is done, or awaited.
    """

    def __init__(
        self,
        device: DevicePool,
        host: HostPool,
        disk: "DiskPool | None",
        copies: PageCopies | None = None,
        meter: Meter | None = None,
        times: LaneTimes | None = None,
        link: Link | None = None,
    ):
        """
        Args:
            copies: of the device, for a GPU.
            meter: is told how long transfers take.
            times: of the lanes of `copies`.
            link: of a simulated device.
        """
        self._spec, self._host, self._disk, self._meter = device.spec, host, disk, meter or Meter()
        self._copier: Copier = (
            ThreadCopier(device, host, self._meter, link)
            if copies is None
            else LaneCopier(device, host, copies, times or LaneTimes(copies.streams, self._meter))
        )
        self._disk_threads = ThreadPoolExecutor(DISK_THREADS, "kv-disk")
        self._jobs: dict[int, tuple[Transfer, Event]] = {}
        # the newest copy that touches a slot, by (where copies go, tier and number of the slot)
        self._touched_by: dict[tuple[Tier, Tier, int], Event] = {}
        self._last_id = -1
        self.bytes: Counter[tuple[Tier, Tier]] = Counter()

    def start(self, transfers: list[Transfer], await_ids: list[int]) -> None:
        """Starts transfers; what is computed from now on comes after the copies of `await_ids`, for which a GPU waits
        and not the caller. The caller does wait for those of the disk.

        Transfers that were started before are passed over, so that a plan may be sent again.
        """
        new = [transfer for transfer in transfers if transfer.id > self._last_id]
        border = self._copier.border() if new else []
        for batch in _batches(new):
            self._start(batch, border)
            self._last_id = batch[-1].id
        for id in await_ids:
            if id in self._jobs:
                transfer, end = self._jobs[id]
                if Tier.DISK in (transfer.source, transfer.target):
                    end.synchronize()
                else:
                    self._copier.hold(end)

    def wait(self, ids: list[int]) -> None:
        """Has the caller wait for transfers, so that `report` tells of them."""
        for id in ids:
            if id in self._jobs:
                self._jobs[id][1].synchronize()

    def filling(self) -> dict[int, Event]:
        """By slot of the host the end of the copy that fills it, of those that were not reported."""
        return {
            slot: end for (way, tier, slot), end in self._touched_by.items() if way is Tier.HOST and tier is Tier.HOST
        }

    def report(self) -> EndedTransfers:
        """What has ended since the last call."""
        ended = EndedTransfers()
        for id, (transfer, end) in list(self._jobs.items()):
            if not end.query():
                continue
            del self._jobs[id]
            for key in _keys(transfer):
                if self._touched_by.get(key) is end:
                    del self._touched_by[key]
            error = end.error if isinstance(end, Task) else None
            if error is not None:
                if Tier.DISK not in (transfer.source, transfer.target):
                    raise error
                reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
                ended.failed.append((id, reason))
                continue
            ended.done.append(id)
            route = transfer.source, transfer.target
            self.bytes[route] += self._spec.route_bytes(*route)
            if transfer.target is Tier.DISK:
                assert self._disk is not None
                ended.checksums[id] = self._disk.checksums(transfer.target_slot)
        return ended

    def close(self) -> None:
        """Waits for what is on its way."""
        self._disk_threads.shutdown(cancel_futures=True)  # before the copier, for whose copies they may wait
        self._copier.close()
        self._jobs.clear()
        self._touched_by.clear()

    def _start(self, batch: list[Transfer], border: list[Event]) -> None:
        first = batch[0]
        if Tier.DISK in (first.source, first.target):
            self._jobs[first.id] = first, Task(self._disk_threads, self._disk_task(first, border))
            return
        # copies the other way that share a slot: of two, one reads it and one fills it
        other_way = {
            id(event): event
            for transfer in batch
            for end, slot in ((transfer.source, transfer.source_slot), (transfer.target, transfer.target_slot))
            if (event := self._touched_by.get((transfer.source, end, slot))) is not None
        }
        ends = self._copier.start(batch, [*border, *other_way.values()])
        for transfer, end in zip(batch, ends, strict=True):
            self._jobs[transfer.id] = transfer, end
            for key in _keys(transfer):
                self._touched_by[key] = end

    def _disk_task(self, transfer: Transfer, border: list[Event]) -> Callable[[], None]:
        """What a thread does; it waits for copies that touch its host page."""
        assert self._disk is not None
        if transfer.target is Tier.DISK:
            slot, disk_slot, work, after = transfer.source_slot, transfer.target_slot, self._disk.store, []
            ways = [Tier.HOST]
        else:
            slot, disk_slot, work, after = transfer.target_slot, transfer.source_slot, self._disk.load, list(border)
            ways = [Tier.HOST, Tier.DEVICE]
        copies = (self._touched_by.get((way, Tier.HOST, slot)) for way in ways)
        after += [event for event in copies if event is not None]
        return partial(self._run, after, transfer.route, partial(work, disk_slot, self._host.page(slot)))

    def _run(self, after: list[Event], route: str, work: Callable[[], None]) -> None:
        for event in after:
            event.synchronize()
        start = now()
        work()
        self._meter.add(route, start, pages=1)


def _keys(transfer: Transfer) -> list[tuple[Tier, Tier, int]]:
    """The keys of `Mover._touched_by` that a transfer has."""
    way = transfer.target
    return [(way, transfer.source, transfer.source_slot), (way, transfer.target, transfer.target_slot)]


def _batches(transfers: list[Transfer]) -> Iterator[list[Transfer]]:
    """Transfers that can be started together: one of the disk, or copies in a row of one direction, none of which
    fills what another does."""
    batch: list[Transfer] = []
    for transfer in transfers:
        joins = (
            bool(batch)
            and Tier.DISK not in (transfer.source, transfer.target)
            and (transfer.source, transfer.target) == (batch[0].source, batch[0].target)
            and all(transfer.target_slot != one.target_slot for one in batch)
        )
        if batch and not joins:
            yield batch
            batch = []
        batch.append(transfer)
    if batch:
        yield batch
