"""A group of one rank, in this process."""

from collections.abc import Callable
from pathlib import Path

import torch

from distkv.workers.cache_place import CachePlace, free_bytes
from distkv.workers.errors import ConfigError
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.rank import Loaded, Rank
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes


class LocalGroup:
    """A `RankGroup` whose engine runs in this process too."""

    def __init__(self, device: str, check: Callable[[], None] = lambda: None):
        """Chooses the device, "auto" for CUDA where there is any; raises ConfigError when it is not there.

        Args:
            check: called before each tensor that `load` reads; what it raises ends that.
        """
        self.device = _local_device(device)
        self._check = check
        self._rank: Rank | None = None

    @property
    def rank(self) -> Rank:
        """The one rank, once it is loaded."""
        assert self._rank is not None
        return self._rank

    def make_executor(self) -> RankExecutor:
        """What runs the steps of the one engine on this group."""
        return RankExecutor.on(self.rank)

    def load(self, config: RankConfig) -> list[Loaded]:
        """See `RankGroup.load`."""
        self._rank = Rank(config, Communicators(), self._check)
        return [self._rank.loaded]

    def capacity(self, of_device: bool) -> Capacity:
        """See `RankGroup.capacity`."""
        return self.rank.page_capacity(1, of_device)

    def free_disk_bytes(self, folder: Path) -> int:
        """See `RankGroup.free_disk_bytes`."""
        return free_bytes(folder)

    def allocate(self, sizes: PoolSizes, place: CachePlace | None) -> list[tuple[int, int, int]]:
        """See `RankGroup.allocate`."""
        return [self.rank.allocate(sizes, place)]

    def bandwidth(self) -> list[Bandwidth]:
        """See `RankGroup.bandwidth`."""
        return [self.rank.bandwidth()]

    def close(self) -> None:
        """See `RankGroup.close`."""
        if self._rank is not None:
            self._rank.close()


def _local_device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda' and torch sees no CUDA device; use device='cpu' or install a CUDA build of torch"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
