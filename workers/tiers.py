"""The three pools of one rank, and what moves pages between them."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from distkv.storage.device_pool import DevicePool
from distkv.storage.host_pool import HostPool
from distkv.storage.mover import Mover
from distkv.storage.page_spec import PageSpec
from distkv.storage.read_ahead import ReadAhead
from distkv.storage.staging_ring import Load, StagingRing, Stream
from distkv.workers.report import Report

if TYPE_CHECKING:
    from distkv.storage.disk_pool import DiskPool


class PoolSizes(msgspec.Struct, array_like=True, frozen=True):
    """Pages of each tier, the same on all ranks."""

    device: int = 0
    host: int = 0
    disk: int = 0
    staging: int = 0  # pages of the staging ring, of which it holds one layer
    read_ahead: int = 0  # layer slices of host memory for reads from disk; 0 where the device is a CPU


class RankTiers:
    """Owns the pools of a rank, the mover and the staging ring."""

    def __init__(
        self,
        spec: PageSpec,
        sizes: PoolSizes,
        device: torch.device,
        folder: Path | None = None,
        rank: int = 0,
        held_heads: list[int] | None = None,
    ):
        """
        Args:
            folder: of the disk tier, needed where it has pages; rank 0 locks it and makes the array.
            held_heads: KV heads of each rank.
        """
        self._spec = spec
        size = spec.page_bytes
        self.nbytes = sizes.device * size, sizes.host * size, sizes.disk * size
        self._bad_reads: dict[int, str] = {}
        self._told: dict[str, int] = {}
        with ExitStack() as stack:  # what is open is closed again if something fails on the way
            self.device = DevicePool(spec, sizes.device, device)
            stack.callback(self.device.close)
            self.host = HostPool(spec, sizes.host, pinned=device.type == "cuda")
            stack.callback(self.host.close)
            self.disk = self._open_disk(stack, folder, sizes.disk, rank, held_heads) if sizes.disk else None
            read_ahead = None
            if self.disk is not None and sizes.read_ahead:
                read_ahead = ReadAhead(spec, sizes.read_ahead, self.disk, pinned=device.type == "cuda")
                stack.callback(read_ahead.close)
            self.ring = StagingRing(spec, sizes.staging, self.host, self.disk, read_ahead, device)
            stack.callback(self.ring.close)
            self.mover = Mover(self.device, self.host, self.disk)
            stack.callback(self.mover.close)
            self._open = stack.pop_all()

    @contextmanager
    def stream(self, loads: list[Load]) -> Iterator[Stream | None]:
        """The stream of a step's loads, None when there are none."""
        if not loads:
            yield None
            return
        stream = self.ring.begin(loads)
        try:
            yield stream
        finally:
            stream.close()
            self._bad_reads |= stream.bad_reads

    def take_report(self) -> Report:
        """See `Rank.take_report`."""
        moved = self.mover.report()
        routes = {
            f"{source.name}_to_{target.name}".lower(): count for (source, target), count in self.mover.bytes.items()
        }
        routes |= {f"{tier.name}_streamed".lower(): count for tier, count in self.ring.bytes.items()}
        new = {route: count - self._told.get(route, 0) for route, count in routes.items()}
        self._told = routes
        bad_reads, self._bad_reads = self._bad_reads, {}
        return Report(
            moved.done, moved.failed, moved.checksums, list(bad_reads.items()),
            {route: count for route, count in new.items() if count},
        )  # fmt: skip

    def close(self) -> None:
        """Waits for what is on its way, frees memory, and removes what lies on disk. A second call does nothing."""
        self._open.close()

    def _open_disk(
        self, stack: ExitStack, folder: Path | None, num_pages: int, rank: int, held_heads: list[int] | None
    ) -> "DiskPool":
        from distkv.storage.cache_folder import DiskHeads, FolderLock, make_array, matches, remove_array
        from distkv.storage.disk_pool import DiskPool  # imports zarr

        assert folder is not None and held_heads is not None
        heads = DiskHeads(sum(held_heads[:rank]), sum(held_heads), math.gcd(*held_heads))
        if rank == 0:
            lock = FolderLock(folder)
            stack.callback(lock.release)
        if rank == 0 or not matches(folder, self._spec, num_pages, heads):  # another node may have a disk of its own
            make_array(folder, self._spec, num_pages, heads)
            stack.callback(remove_array, folder)
        return DiskPool(self._spec, folder, num_pages, heads)
