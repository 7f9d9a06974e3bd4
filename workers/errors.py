"""The errors that a rank or a group of ranks raises on purpose: those of the cache, and its own."""

from distkv.storage.errors import CapacityError as CapacityError
from distkv.storage.errors import ConfigError as ConfigError
from distkv.storage.errors import DistKVError as DistKVError
from distkv.storage.errors import StoreError as StoreError


class WorkerDied(DistKVError):
    """A rank of the tensor-parallel group ended while it was needed.

    Attributes:
        rank: its tensor-parallel rank, or -1 when the whole group is meant.
        node: address of the node it ran on.
        cause: what is known of why it ended.
    """

    def __init__(self, rank: int, node: str, cause: str):
        super().__init__(
            f"rank {rank} on node {node} died: {cause}. The engine is closed and its cluster resources are "
            "released; make a new LLM to go on"
        )
        self.rank, self.node, self.cause = rank, node, cause

    def __reduce__(self):
        return WorkerDied, (self.rank, self.node, self.cause)
