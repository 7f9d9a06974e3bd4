"""The errors that distkv raises on purpose. Every message says what is wrong and what to do about it.

This module imports nothing, so all four packages may use it.
"""


class DistKVError(Exception):
    """Base of all errors below; catching it catches every error distkv raises on purpose."""


class ConfigError(DistKVError, ValueError):
    """An engine option, a model folder or a checkpoint that cannot be used; names the field and what is supported."""


class RequestError(DistKVError, ValueError):
    """A request is malformed: an empty or too long a prompt, say, or a sampling parameter out of range."""


class CapacityError(DistKVError):
    """The memory that was configured cannot hold what was asked for; states both sizes and the option to change."""


class StoreError(DistKVError):
    """Stored data could not be fetched, written or verified; names what and why."""


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
