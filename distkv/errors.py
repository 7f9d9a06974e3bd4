"""The errors that distkv raises on purpose. Every message says what is wrong and what to do about it.

Each package defines its own; here are all of them.
"""

from distkv.workers.errors import CapacityError as CapacityError
from distkv.workers.errors import ConfigError as ConfigError
from distkv.workers.errors import DistKVError as DistKVError
from distkv.workers.errors import StoreError as StoreError
from distkv.workers.errors import WorkerDied as WorkerDied


class RequestError(DistKVError, ValueError):
    """A request is malformed: an empty or too long a prompt, say, or a sampling parameter out of range."""


class Draining(DistKVError):
    """An engine that is about to end has refused a request, or has ended it before it was done. Send it elsewhere
    then, or to the next engine. `output` has what there is of the answer, or is None."""


class EngineUnavailable(DistKVError):
    """No engine runs: all were lost, and none could be started anew as yet. The same request may be answered later."""


class QueueFull(CapacityError):
    """As many answers wait for their turn as may; the same request may be taken later."""


for public in (
    DistKVError, ConfigError, RequestError, CapacityError, QueueFull, StoreError, WorkerDied, Draining,
    EngineUnavailable,
):  # fmt: skip
    public.__module__ = "distkv"  # where users find it, so that a traceback calls it by that name
del public
