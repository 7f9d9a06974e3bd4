"""What ranks are told of the sizes of their pools, and what they tell of the machine to find these."""

import msgspec

from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.tier import Tier

# Share of the memory free at start that each KV pool in CPU memory may grow to, unless a size is given.
CPU_KV_SHARE = 0.25
# And what all ranks of a machine pin of it at most: it is taken at once, and of a large one that would last minutes.
PINNED_KV_BYTES = 2**35
# Of the states that decode on CUDA holds at a time; a context that has more goes through in rounds. With 32 heads of
# 128 numbers a million tokens have 4096 states, in 65 MiB, and there is room for an answer behind them.
STATE_BYTES = 66 * 2**20

Budget = list[tuple[str, int]]
"""What takes how many bytes, for people to read."""


class PoolSizes(msgspec.Struct, array_like=True, frozen=True):
    """Pages of each tier, the same on all ranks."""

    device: int = 0
    host: int = 0
    disk: int = 0
    staging: int = 0  # pages of the staging ring, of which it holds one layer
    read_ahead: int = 0  # layer slices of host memory for reads from disk; 0 where `Kind.reads_ahead` says no
    summaries: int = 0  # pages that requests can hold at a time, where a policy of attention chooses by `PageSummaries`


class Capacity(msgspec.Struct, array_like=True, frozen=True):
    """Pages that fit into a rank's memory when nobody says how many bytes they may take."""

    device: int
    host: int
    budget: Budget = []  # what the memory of the device is for, where that was found out


class Bandwidth(msgspec.Struct, array_like=True, frozen=True):
    """Bytes per second of one rank; 0 for a tier that is off, or a disk that is not measured."""

    host: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0  # at which the host attends to pages where they lie, where it has a share of them


def host_kv_bytes(available: int, pinned: bool, ranks_on_node: int) -> int:
    """Bytes that a KV pool in CPU memory may grow to on each rank, of so many that are available on its machine.

    Args:
        pinned: whether the memory is registered with the driver of a GPU.
    """
    room = int(available * CPU_KV_SHARE)
    return (min(room, PINNED_KV_BYTES) if pinned else room) // ranks_on_node


def ring_bytes(spec: PageSpec, staging_pages: int, num_buffers: int) -> int:
    """Bytes of a rank's staging ring of `num_buffers` buffers, where the option counts pages of NUM_BUFFERS of them."""
    return staging_pages * spec.slice_bytes_in(Tier.HOST) * num_buffers // NUM_BUFFERS
