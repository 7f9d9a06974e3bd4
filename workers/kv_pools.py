"""The three pools of one rank, and what moves pages between them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from distkv.storage.device import Device
from distkv.storage.disk.cache_folder import Description, FolderLock
from distkv.storage.disk.mounts import is_local
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.meter import Meter
from distkv.storage.moving.lane_times import LaneTimes
from distkv.storage.moving.mover import Mover
from distkv.storage.moving.read_ahead import ReadAhead
from distkv.storage.moving.slices_on_demand import SlicesOnDemand
from distkv.storage.moving.staging_ring import STREAMED, Load, StagingRing, Stream
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.pools.page_pool import PageCodec
from distkv.storage.pools.page_summaries import PageSummaries
from distkv.storage.tier import Tier, route_name
from distkv.workers.cache_place import CachePlace, join_folder, stages_here
from distkv.workers.group.report import Report
from distkv.workers.sizes import PoolSizes

if TYPE_CHECKING:
    from distkv.storage.pools.disk_pool import DiskPool


class Noted(Protocol):
    """What reads pages during a step, as a `Stream` does."""

    bad_reads: dict[int, str]  # see `Stream`

    def close(self) -> None:
        """See `Stream`."""


AnyStream = TypeVar("AnyStream", bound=Noted)


@dataclass(frozen=True)
class DiskTier:
    """Where a rank's disk tier lies."""

    place: CachePlace
    share: DiskShare
    rank: int
    kept: Description | None  # of pages that outlive the process; None for a folder that is emptied on open and close
    is_alone: bool = False  # whether the engine has no other rank


class KVPools:
    """Owns the pools of a rank, the mover and the staging ring."""

    def __init__(
        self,
        spec: PageSpec,
        sizes: PoolSizes,
        device: Device,
        disk: DiskTier | None = None,
        meter: Meter | None = None,
        codec: PageCodec | None = None,
    ):
        """
        Args:
            disk: needed where the disk has pages.
            meter: is told what moving takes.
            codec: of `spec`, where that has one.
        """
        self.spec, self.meter = spec, meter or Meter()
        self._counted: Counter[str] = Counter()
        on_device, on_host, on_disk = (spec.page_bytes_in(tier) for tier in Tier)
        own_files = disk is not None and disk.share.reports
        self.nbytes = sizes.device * on_device, sizes.host * on_host, sizes.disk * on_disk * own_files
        self._missing: list[int] = []
        self._lack = ""  # why they are missing
        self._bad_reads: dict[int, str] = {}
        self._reported: dict[str, int] = {}
        self._drop_arrays: Callable[[], None] | None = None  # of no use to any rank on this disk
        self.summaries = PageSummaries(spec, device, sizes.summaries) if sizes.summaries else None
        with ExitStack() as stack:  # what is open is closed again if something fails on the way
            self.device = DevicePool(spec, sizes.device, device, codec)
            stack.callback(self.device.close)
            self.host = HostPool(spec, sizes.host, pinned=device.pinned)
            stack.callback(self.host.close)
            self.disk = None
            if sizes.disk:
                assert disk is not None
                self.disk = self._open_disk(stack, disk, sizes.disk)
            self.copies = device.make_copies()
            self.times = None if self.copies is None else LaneTimes(self.copies.streams, self.meter)
            self.mover = Mover(
                self.device, self.host, self.disk, self.copies, self.meter, self.times, device.link
            )  # fmt: skip
            stack.callback(self.mover.close)
            read_ahead = None
            if self.disk is not None and sizes.read_ahead:
                read_ahead = ReadAhead(spec, sizes.read_ahead, self.disk, pinned=device.pinned)
                stack.callback(read_ahead.close)
            self.ring = StagingRing(
                spec, sizes.staging, self.host, self.disk, read_ahead, device, self.copies, self.mover.filling,
                self.meter, self.times,
            )  # fmt: skip
            stack.callback(self.ring.close)
            if self.copies is not None:  # first of all, since what is on its way reads and fills all this memory
                stack.callback(self.copies.streams.synchronize)
            self._open = stack.pop_all()

    def adopt(self, entries: dict[int, bytes]) -> None:
        """Takes over what an earlier process left on disk, see `DiskPool.adopt`; the report says what is missing."""
        assert self.disk is not None
        if self._drop_arrays is not None:
            self._drop_arrays()
        self._missing = self.disk.adopt(entries)
        self._lack = self.disk.lack

    def take_in(self, entries: dict[int, bytes]) -> None:
        """Takes over pages that were put on disk since, see `DiskPool.take_in`; the report says what is missing."""
        assert self.disk is not None
        self._missing += self.disk.take_in(entries)

    @contextmanager
    def stream(self, loads: list[Load]) -> Iterator[Stream | None]:
        """The stream of a step's loads, None when there are none."""
        if not loads:
            yield None
            return
        with self.noting(self.ring.begin(loads)) as stream:
            yield stream

    @contextmanager
    def stream_on_demand(self, loads: list[Load]) -> Iterator[SlicesOnDemand]:
        """A stream of a step's loads, of which there may be none, and of what the step asks for; on a CPU."""
        with self.noting(SlicesOnDemand(self.ring, loads)) as stream:
            yield stream

    @contextmanager
    def noting(self, stream: AnyStream) -> Iterator[AnyStream]:
        """Closes a stream and takes down what it could not read."""
        try:
            yield stream
        finally:
            stream.close()
            self._bad_reads |= stream.bad_reads

    def count(self, route: str, num_bytes: int) -> None:
        """Takes down bytes that were read where they lie, for the next report."""
        self._counted[route] += num_bytes

    def end_with(self, close: Callable[[], None]) -> None:
        """Has something end when the pools are closed, before them."""
        self._open.callback(close)

    def take_report(self) -> Report:
        """See `Rank.take_report`."""
        if self.times is not None:
            self.times.collect()
        ended = self.mover.report()
        routes = {route_name(*ends): count for ends, count in self.mover.bytes.items()}
        routes |= {STREAMED[tier]: count for tier, count in self.ring.bytes.items()} | self._counted
        new = {route: count - self._reported.get(route, 0) for route, count in routes.items()}
        self._reported = routes
        bad_reads, self._bad_reads = self._bad_reads, {}
        (missing, self._missing), (lack, self._lack) = (self._missing, []), (self._lack, "")
        return Report(
            ended.done, ended.failed, ended.checksums, list(bad_reads.items()),
            {route: count for route, count in new.items() if count}, missing, measures=self.meter.take(), lack=lack,
        )  # fmt: skip

    def close(self) -> None:
        """Waits for what is on its way, frees memory, and removes what lies on disk unless it is kept. A second call
        does nothing."""
        self._open.close()

    def _open_disk(self, stack: ExitStack, disk: DiskTier, num_pages: int) -> "DiskPool":
        from distkv.storage.disk.disk_array import make_array, remove_arrays
        from distkv.storage.disk.reopen import join, rejoin, reopen
        from distkv.storage.disk.scratch import sweep_scratch
        from distkv.storage.disk.synced_pages import SyncedPages
        from distkv.storage.pools.disk_pool import DiskPool  # imports zarr

        folder, share = disk.place.folder, disk.share
        spec = replace(self.spec, num_kv_heads=share.num_heads)  # of the array
        joined = stack.enter_context(join_folder(disk.place, share, disk.is_alone))
        if joined.lock is not None and disk.kept is None:
            remove_arrays(folder)
            make_array(folder, spec, num_pages, share.array)
            stack.callback(_remove_arrays, folder, joined.lock)
        elif joined.lock is not None:
            assert disk.kept is not None
            sweep_scratch(folder.parent)
            if disk.rank == 0:
                reopen(folder, spec, num_pages, disk.kept, share.array)
            else:  # a node with a disk of its own
                rejoin(folder, spec, num_pages, share.array)
        elif joined.makes_array:
            join(folder, spec, num_pages, share.array)
        synced = SyncedPages(folder, has_catalogue=disk.rank == 0) if disk.kept is not None else None
        if synced is not None:
            stack.callback(synced.close)  # its thread is to end though the pool cannot be made
        share = replace(share, writes=joined.writes, is_first=joined.lock is not None)
        if share.is_first and disk.kept is not None and is_local(folder):  # else others may not be seen yet
            self._drop_arrays = partial(_drop_arrays, disk)
        pool = DiskPool(self.spec, folder, num_pages, share, self.meter, synced)
        stack.callback(pool.close)
        return pool


def _drop_arrays(disk: DiskTier) -> None:
    """When all ranks of the engine have joined."""
    from distkv.storage.disk.disk_array import drop_arrays  # imports zarr

    share = disk.share
    drop_arrays(disk.place.folder, {share.layers, *stages_here(disk.place)}, share.num_layers)


def _remove_arrays(folder: Path, lock: FolderLock) -> None:
    """Not where another engine has taken the folder over."""
    from distkv.storage.disk.disk_array import remove_arrays  # imports zarr

    if not lock.is_lost:
        remove_arrays(folder)
