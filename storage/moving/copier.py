"""Copies of whole pages between device and host: on a CPU in a thread, on a GPU on lanes of their own."""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Protocol

from distkv.storage.meter import Meter, now
from distkv.storage.moving.lane_times import LaneTimes
from distkv.storage.moving.link import Link, Way, sleep_until
from distkv.storage.moving.page_copies import PageCopies
from distkv.storage.moving.streams import Event, Lane
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.pools.page_pool import RowCodec, check_slot
from distkv.storage.tier import Tier, Transfer


class Task:
    """Work of a thread, as an event that happens when it has ended, however it did."""

    def __init__(self, threads: ThreadPoolExecutor, work: Callable[[], None]):
        self._future: Future[None] = threads.submit(work)

    def query(self) -> bool:
        return self._future.done()

    def synchronize(self) -> None:
        with suppress(CancelledError):
            self._future.exception()

    @property
    def error(self) -> BaseException | None:
        """Why it failed, once it has ended."""
        return self._future.exception()


class Copier(Protocol):
    """Runs batches of copies of one direction."""

    def border(self) -> list[Event]:
        """What the device has been given to compute so far: it may read any slot, and write those of the device."""

    def start(self, batch: list[Transfer], after: list[Event]) -> list[Event]:
        """Starts copies of distinct targets, which are all of one direction; returns the end of each.

        Args:
            after: what must have happened before.
        """

    def hold(self, event: Event) -> None:
        """Lets nothing be computed from now on before a copy has ended."""

    def close(self) -> None:
        """Waits for what is on its way."""


class ThreadCopier:
    """A thread that copies pages in turn. It suits a CPU, where what computes has ended when the next plan begins; a
    simulated link has each copy last as long as it would there."""

    def __init__(self, device: DevicePool, host: HostPool, meter: Meter, link: Link | None = None):
        self._device, self._host, self._meter, self._link = device, host, meter, link
        self._thread = ThreadPoolExecutor(1, "kv-copy")

    def border(self) -> list[Event]:
        return []

    def start(self, batch: list[Transfer], after: list[Event]) -> list[Event]:
        return [Task(self._thread, self._copy(transfer)) for transfer in batch]  # in turn, so that none has to wait

    def hold(self, event: Event) -> None:
        event.synchronize()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _copy(self, transfer: Transfer) -> Callable[[], None]:
        if transfer.target is Tier.DEVICE:
            work = partial(self._device.store, transfer.target_slot, self._host.page(transfer.source_slot))
        else:
            work = partial(self._device.load, transfer.source_slot, self._host.page(transfer.target_slot))
        return partial(self._run, work, transfer)

    def _run(self, work: Callable[[], None], transfer: Transfer) -> None:
        start = now()
        work()
        if self._link is not None:
            way = Way.UP if transfer.target is Tier.DEVICE else Way.DOWN
            num_bytes = self._device.spec.route_bytes(transfer.source, transfer.target)
            sleep_until(self._link.carry(way, num_bytes, start))
        self._meter.add(transfer.route, start, pages=1)


class LaneCopier:
    """A lane of a GPU for each direction, and nobody on the host waits. With a codec its kernels copy."""

    def __init__(self, device: DevicePool, host: HostPool, copies: PageCopies, times: LaneTimes):
        self._device, self._host, self._copies, self._times = device, host, copies, times
        if device.codec is not None:
            assert isinstance(device.codec, RowCodec)
            copies.kernels |= {Lane.SPILL: device.codec.encode_rows, Lane.FETCH: device.codec.decode_rows}

    def border(self) -> list[Event]:
        return [self._copies.streams.record(Lane.COMPUTE)]

    def start(self, batch: list[Transfer], after: list[Event]) -> list[Event]:
        lane, source, target = Lane.SPILL, self._device.rows(), self._host.rows()
        if batch[0].target is Tier.DEVICE:
            lane, source, target = Lane.FETCH, target, source
        for transfer in batch:
            check_slot(transfer.source_slot, len(source))
            check_slot(transfer.target_slot, len(target))
        for event in after:
            self._copies.streams.wait(lane, event)
        slots = [(transfer.source_slot, transfer.target_slot) for transfer in batch]
        pairs = self._copies.prepare(lane, slots, self._host.piece_pages)
        begun = self._times.begin(lane)
        self._copies.start(lane, source, target, pairs)
        return [self._times.end(lane, begun, batch[0].route, pages=len(batch))] * len(batch)

    def hold(self, event: Event) -> None:
        self._copies.streams.wait(Lane.COMPUTE, event)

    def close(self) -> None:
        for lane in (Lane.FETCH, Lane.SPILL):
            self._copies.streams.record(lane).synchronize()
