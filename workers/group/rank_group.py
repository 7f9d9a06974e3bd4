"""A group of ranks, wherever they run, until an engine runs on them."""

from pathlib import Path
from typing import Protocol

from distkv.workers.cache_place import CachePlace
from distkv.workers.rank import Loaded
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes


class RankGroup(Protocol):
    """The tensor-parallel ranks of one engine. `load` comes first, `allocate` after `capacity`. Then an engine runs on
    them: with `LocalGroup.make_executor` in this process, by `RayGroup.start` beside rank 0."""

    device: str  # "cpu" or "cuda"

    def load(self, config: RankConfig) -> list[Loaded]:
        """Loads the model on all ranks; raises ConfigError, or WorkerDied when a rank is lost. Returns what each
        will run."""
        ...

    def capacity(self, of_device: bool) -> Capacity:
        """Pages that fit on the rank with the least room, see `Rank.page_capacity`."""
        ...

    def free_disk_bytes(self, folder: Path) -> int:
        """See `free_bytes`, of the node with the least."""
        ...

    def allocate(self, sizes: PoolSizes, place: CachePlace | None) -> list[tuple[int, int, int]]:
        """Makes the pools of all ranks; returns for each rank the bytes of device, host and disk."""
        ...

    def bandwidth(self) -> list[Bandwidth]:
        """How fast each rank gets cold pages, all of them at once."""
        ...

    def close(self) -> None:
        """Frees what the ranks hold; a second call does nothing."""
