"""What a device does beside the host: lanes of work that run in order, each by itself, and the events that tie them.

A CPU rank has none of this. `CudaStreams` is thin over torch; the tests drive the same code over a simulated device,
which runs what is enqueued as late and in as odd an order as the declared waits allow.
"""

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Lane(Enum):
    """A queue of a device. PCIe carries both directions at once, so each has lanes of its own."""

    COMPUTE = "compute"  # what the model runs: the stream that is current where the work is enqueued
    LOAD = "stream a load"  # layer slices, into the buffers of the staging ring
    FETCH = "fetch a page"  # whole pages, from host to device
    SPILL = "spill a page"  # whole pages, from device to host


class Event(Protocol):
    """Something that happens once."""

    def query(self) -> bool:
        """Whether it has happened."""

    def synchronize(self) -> None:
        """Has the calling thread wait for it."""


class Streams(Protocol):
    """The lanes of one device. Calls enqueue and return; no order holds between lanes but that of `wait`."""

    def run(self, lane: Lane, work: Callable[[], object]) -> None:
        """Enqueues `work`: asynchronous calls on tensors, which nobody may change on the host before they have run."""

    def record(self, lane: Lane, timed: bool = False) -> Event:
        """An event that happens once all work of the lane so far has ended; `timed`, so that it can be told when."""

    def nanoseconds_between(self, first: Event, last: Event) -> int:
        """The time between two timed events that have happened."""

    def wait(self, lane: Lane, event: Event) -> None:
        """Holds back all later work of the lane until a recorded event has happened."""

    def upload(self, lane: Lane, values: Tensor) -> Tensor:
        """A copy of a small CPU tensor on the device, for work of the same lane alone."""

    def seconds(self, lane: Lane, enqueue: Callable[[], object]) -> float:
        """How long the device was at what a call enqueues on a lane, by its own clock. The calling thread waits."""

    def synchronize(self) -> None:
        """Has the calling thread wait for all lanes."""


class CudaStreams:
    """`Streams` of a CUDA device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in Lane if lane is not Lane.COMPUTE}

    def run(self, lane: Lane, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream(lane)):
            work()

    def record(self, lane: Lane, timed: bool = False) -> Event:
        # a thread that waits for it sleeps and leaves its core to others
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(self._stream(lane))
        return event

    def nanoseconds_between(self, first: Event, last: Event) -> int:
        assert isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event)
        return int(first.elapsed_time(last) * 1e6)

    def wait(self, lane: Lane, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream(lane).wait_event(event)

    def upload(self, lane: Lane, values: Tensor) -> Tensor:
        # Both ends may be dropped while the copy is on its way: torch's host allocator keeps pinned memory until the
        # copies out of it have ended, and memory allocated on a stream serves the work of that stream in order.
        with torch.cuda.stream(self._stream(lane)):
            return values.pin_memory().to(self._device, non_blocking=True)

    def seconds(self, lane: Lane, enqueue: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self._stream(lane))
        enqueue()
        end.record(self._stream(lane))
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._streams[lane] if lane in self._streams else torch.cuda.current_stream(self._device)
