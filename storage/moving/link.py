"""A link between host and device that is simulated: by a clock, beside which the host copies as ever."""

import threading
import time
from enum import Enum


class Way(Enum):
    """A direction. PCIe carries both at once, so each has all of the rate."""

    UP = "to the device"
    DOWN = "to the host"


class Link:
    """Says when what crosses a link of a given rate is there; whoever needs it sleeps until then, which takes no core.

    Each way carries one thing after the other, in the order of the calls, from any thread. Times are nanoseconds of
    `meter.now`.
    """

    def __init__(self, bytes_per_second: float):
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = dict.fromkeys(Way, 0)

    def carry(self, way: Way, num_bytes: int, ready: int) -> int:
        """When so many bytes have crossed that could begin to at `ready`."""
        with self._lock:
            begins = max(self._free_at[way], ready)
            self._free_at[way] = begins + round(num_bytes * 1e9 / self.bytes_per_second)
            return self._free_at[way]


def sleep_until(moment: int) -> None:
    """Has the calling thread sleep until a time of `meter.now`, if that is to come."""
    rest = moment - time.perf_counter_ns()
    if rest > 0:
        time.sleep(rest / 1e9)
