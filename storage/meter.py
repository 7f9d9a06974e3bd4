"""What moving pages costs a rank: the time and the bytes of each kind of work, and with a trace each piece of it.

Kinds are the routes of whole pages (`device_to_host`, `host_to_disk`, `disk_to_host`, `host_to_device`), those of layer
slices through the staging ring (`host_streamed`, `disk_streamed`), what these take of the disk itself: `disk_read`
and `disk_write`; `compute`, steps that read long pieces of prompts and stream nothing; and with a pipeline `stage_step`
and `stage_wait`, steps as far as a stage has a part in them, and what it waited for others meanwhile.
"""

import threading
import time
from collections import Counter
from typing import Any

import msgspec


class Span(msgspec.Struct, array_like=True, frozen=True):
    """A piece of work. Those of one track nest."""

    rank: int
    track: str  # the thread, or the lane of a device
    kind: str
    start: int  # nanoseconds since 1970
    duration: int  # nanoseconds
    details: dict[str, int] = {}


class Measures(msgspec.Struct, array_like=True):
    """What was measured on a rank, or on several together, since the last time."""

    nanoseconds: dict[str, int] = {}  # by kind of work
    num_bytes: dict[str, int] = {}  # of disk_read and disk_write
    checksum_failures: int = 0  # layer slices of one head
    spans: list[Span] = []
    # of pages that tokens have chosen, see `PolicyStats`: pages_visible, pages_chosen, num_audited, mass_covered; and
    # of steps with a pipeline, on rank 0: pipeline_steps, micro_batches
    counts: dict[str, float] = {}

    def add(self, other: "Measures") -> None:
        """Takes in what was measured elsewhere, or later."""
        pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (self.nanoseconds, other.nanoseconds), (self.num_bytes, other.num_bytes), (self.counts, other.counts)
        )  # fmt: skip
        for sums, more in pairs:
            for kind, count in more.items():
                sums[kind] = sums.get(kind, 0) + count
        self.checksum_failures += other.checksum_failures
        self.spans += other.spans


def now() -> int:
    """Where a piece of work begins, in nanoseconds of a clock that all threads and processes of a machine share."""
    return time.perf_counter_ns()


class Meter:
    """Any thread may add to it. Without a trace it keeps sums alone."""

    def __init__(self, rank: int = 0, traces: bool = False):
        self.traces = traces
        self._rank = rank
        self._lock = threading.Lock()
        self._since_1970 = time.time_ns() - now()  # of the beginning of the clock
        self._nanoseconds: Counter[str] = Counter()
        self._num_bytes: Counter[str] = Counter()
        self._checksum_failures = 0
        self._counts: dict[str, float] = {}
        self._spans: list[Span] = []

    def add(self, kind: str, start: int, num_bytes: int = 0, **details: int) -> None:
        """Takes down work of the calling thread that began at `start` and ends now."""
        self.add_between(kind, start, now(), _track() if self.traces else "", num_bytes, details)

    def add_between(
        self,
        kind: str,
        start: int,
        end: int,
        track: str,
        num_bytes: int = 0,
        details: dict[str, int] | None = None,
        is_summed: bool = True,
    ) -> None:
        """The same of work on some track that has ended before; a trace alone shows what is not to be summed up."""
        with self._lock:
            if is_summed:
                self._nanoseconds[kind] += end - start
            if num_bytes:
                self._num_bytes[kind] += num_bytes
            if self.traces:
                self._spans.append(Span(self._rank, track, kind, start + self._since_1970, end - start, details or {}))

    def trace(self, kind: str, start: int, **details: int) -> None:
        """Has a trace show work of the calling thread that ends now, which is not summed up."""
        if self.traces:
            self.add_between(kind, start, now(), _track(), details=details, is_summed=False)

    def count_checksum_failure(self) -> None:
        """Takes down that what was read back from disk is not what was written."""
        with self._lock:
            self._checksum_failures += 1

    def count(self, kind: str, amount: float) -> None:
        """Takes down so many more of something."""
        with self._lock:
            self._counts[kind] = self._counts.get(kind, 0) + amount

    def take(self) -> Measures:
        """All since the last call."""
        with self._lock:
            taken = Measures(
                dict(self._nanoseconds), dict(self._num_bytes), self._checksum_failures, self._spans, self._counts
            )
            self._nanoseconds.clear()
            self._num_bytes.clear()
            self._checksum_failures, self._spans, self._counts = 0, [], {}
        return taken


def _track() -> str:
    """Threads that move pages are called kv-something; all else is the work of the one that runs steps."""
    name = threading.current_thread().name
    return name if name.startswith("kv-") else "step"
