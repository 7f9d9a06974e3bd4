"""The three pools of one rank, and what moves pages between them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from distkv.storage.device_pool import DevicePool
from distkv.storage.host_pool import HostPool
from distkv.storage.mover import Mover
from distkv.storage.page_spec import PageSpec
from distkv.storage.staging_ring import Load, StagingRing, Stream
from distkv.workers.report import Report

if TYPE_CHECKING:
    from distkv.storage.cache_folder import FolderLock
    from distkv.storage.disk_pool import DiskPool


class PoolSizes(msgspec.Struct, array_like=True, frozen=True):
    """Pages of each tier, the same on all ranks."""

    device: int = 0
    host: int = 0
    disk: int = 0
    staging: int = 0  # pages of the staging ring, of which it holds one layer
    read_ahead: int = 0  # layer slices of host memory for reads from disk


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
        self._lock: FolderLock | None = None
        self.disk: DiskPool | None = None
        self._folder = folder
        if sizes.disk:
            assert folder is not None and held_heads is not None
            self._open_disk(folder, sizes.disk, rank, held_heads)
        self.device = DevicePool(spec, sizes.device, device)
        self.host = HostPool(spec, sizes.host, pinned=device.type == "cuda")
        self.mover = Mover(self.device, self.host, self.disk)
        self.ring = StagingRing(spec, sizes.staging, sizes.read_ahead, self.host, self.disk, device)
        size = spec.page_bytes
        self.nbytes = sizes.device * size, sizes.host * size, sizes.disk * size
        self._bad_reads: dict[int, str] = {}
        self._told: dict[str, int] = {}

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
        """Waits for what is on its way, frees memory, and removes what lies on disk."""
        self.mover.close()
        self.ring.close()
        for pool in (self.device, self.host, self.disk):
            if pool is not None:
                pool.close()
        if self._lock is not None:
            from distkv.storage.cache_folder import remove_array

            assert self._folder is not None
            remove_array(self._folder)
            self._lock.release()
            self._lock = None

    def _open_disk(self, folder: Path, num_pages: int, rank: int, held_heads: list[int]) -> None:
        from distkv.storage.cache_folder import DiskHeads, FolderLock, make_array, matches
        from distkv.storage.disk_pool import DiskPool  # imports zarr

        heads = DiskHeads(sum(held_heads[:rank]), sum(held_heads), math.gcd(*held_heads))
        if rank == 0:
            self._lock = FolderLock(folder)
        if rank == 0 or not matches(folder, self._spec, num_pages, heads):  # another node may have a disk of its own
            make_array(folder, self._spec, num_pages, heads)
        self.disk = DiskPool(self._spec, folder, num_pages, heads)
