"""Streaming: layer slices of cold pages pass through a few small buffers on the device, in a fixed order.

The order is known when a step begins: all loads of layer 0, then all of layer 1, and so on. On CUDA, disk reads run
ahead of it in threads as far as the read-ahead memory reaches, and copies to the device run ahead of compute by a
buffer, on a stream of their own. On a CPU both happen when their turn comes, straight into the buffer: threads would
compete with compute for the same cores, what was just copied is read from the processor's cache, and the system itself
reads ahead in files that are read from front to back.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.host_pool import HostPool
from distkv.storage.page_size import NUM_BUFFERS
from distkv.storage.page_spec import PageSpec
from distkv.storage.read_ahead import ReadAhead, Reads
from distkv.storage.tier import Tier, cold_place

if TYPE_CHECKING:
    from distkv.storage.disk_pool import DiskPool, OpenPages, Parts

Load = Sequence[int]
"""Cold places (`tier.location`) that are brought side by side into one buffer."""


class StagingRing:
    """The buffers `[NUM_BUFFERS, buffer_pages, 2, kv_head, page_size, head_dim]` on the device of a rank."""

    def __init__(
        self,
        spec: PageSpec,
        num_pages: int,
        host: HostPool,
        disk: "DiskPool | None",
        read_ahead: ReadAhead | None,
        device: torch.device,
    ):
        """
        Args:
            num_pages: pages of all buffers together; one layer's slice of each is held.
            read_ahead: for pages on disk, with memory for a buffer's at least; on CUDA only.
        """
        self.spec, self.host, self.disk, self.read_ahead = spec, host, disk, read_ahead
        self.buffer_pages = num_pages // NUM_BUFFERS
        self.buffers = torch.zeros(
            NUM_BUFFERS, self.buffer_pages, *spec.slice_shape, dtype=spec.dtype, device=device
        )  # fmt: skip
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parts: list[list[Parts]] = []  # of each place of each buffer, which is read into where it lies
        if disk is not None and read_ahead is None:
            self.parts = [[disk.parts(one) for one in buffer] for buffer in self.buffers]
        self.bytes: Counter[Tier] = Counter()  # streamed so far, by where they came from

    def begin(self, loads: Sequence[Load]) -> "Stream":
        """Starts bringing `loads`, each of at most `buffer_pages` places, once for every layer."""
        return Stream(self, loads)

    def close(self) -> None:
        self.parts = []
        self.buffers = self.buffers[:0].clone()


@dataclass(frozen=True)
class _Run:
    """Neighbouring slots of one tier that go to neighbouring places of a buffer."""

    tier: Tier
    first_slot: int
    first: int
    count: int


class Stream:
    """The loads of one step: `take` gives them in order, and `close` must end it."""

    def __init__(self, ring: StagingRing, loads: Sequence[Load]):
        self._ring = ring
        self._loads = [_runs(load, longest=len(load) if ring.stream is None else 1) for load in loads]
        self._sizes = [len(load) for load in loads]
        self._total = ring.spec.num_layers * len(loads)
        self._taken = self._staged = 0
        on_disk = [
            slot
            for runs in self._loads
            for run in runs
            if run.tier is Tier.DISK
            for slot in range(run.first_slot, run.first_slot + run.count)
        ]
        self._disk_slots = on_disk
        self._pages: OpenPages | None = None
        self._reads: Reads | None = None
        if on_disk:
            assert ring.disk is not None
            self._pages = ring.disk.open(on_disk)
            if ring.read_ahead is not None:
                self._reads = ring.read_ahead.begin(self._pages, len(on_disk), ring.buffer_pages)
        self._next_read = 0  # number of the slice that is copied next
        self._ahead = 1 if ring.stream is None else NUM_BUFFERS
        self._ready: deque[torch.cuda.Event] = deque()
        self._released: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._copied: deque[tuple[torch.cuda.Event, int]] = deque()  # reads below the number are copied by the event
        self.bad_reads: dict[int, str] = {}  # disk slot -> why it could not be read
        if ring.stream is not None:  # the step before may still be reading the buffers
            ring.stream.wait_stream(torch.cuda.current_stream())

    def take(self) -> Tensor:
        """The next load: `[pages, 2, kv_head, page_size, head_dim]` on the device, until the next call but one.

        Pages that cannot be read back are zeros and noted in `bad_reads`, so that the ranks of a group stay in step.
        """
        number = self._taken
        self._taken += 1
        if self._ring.stream is not None and number:
            event = torch.cuda.Event()
            event.record()
            self._released[(number - 1) % NUM_BUFFERS] = event
        while self._staged < min(number + self._ahead, self._total):
            if self._staged > number and not self._is_read(self._staged):
                break  # compute shall not wait for the disk before its turn
            self._stage(self._staged)
            self._staged += 1
        if self._ring.stream is not None:
            torch.cuda.current_stream().wait_event(self._ready.popleft())
        return self._ring.buffers[number % NUM_BUFFERS, : self._sizes[number % len(self._sizes)]]

    def close(self) -> None:
        """Waits for reads and copies on their way, which a step that failed leaves behind."""
        if self._reads is not None:
            self._reads.close()
        if self._pages is not None:
            self._pages.close()
        if self._ring.stream is not None:
            self._ring.stream.synchronize()

    def _stage(self, number: int) -> None:
        ring = self._ring
        layer, load = divmod(number, len(self._loads))
        buffer = number % NUM_BUFFERS
        if ring.stream is None:
            self._fill(buffer, layer, load)
            return
        with torch.cuda.stream(ring.stream):
            released = self._released[number % NUM_BUFFERS]
            if released is not None:
                ring.stream.wait_event(released)
            self._fill(buffer, layer, load)
            ready = torch.cuda.Event()
            ready.record()
        self._ready.append(ready)
        if self._reads is not None:
            self._copied.append((ready, self._next_read))
            while self._copied and self._copied[0][0].query():
                self._reads.free(self._copied.popleft()[1])

    def _fill(self, buffer: int, layer: int, load: int) -> None:
        ring = self._ring
        for run in self._loads[load]:
            ring.bytes[run.tier] += run.count * ring.spec.layer_slice_bytes
            if run.tier is Tier.HOST:
                source = ring.host.slices(run.first_slot, run.count, layer)
                ring.buffers[buffer, run.first : run.first + run.count].copy_(source, non_blocking=True)
                continue
            for place in range(run.first, run.first + run.count):
                self._copy_read(buffer, place)

    def _copy_read(self, buffer: int, place: int) -> None:
        """Brings the next slice that comes from disk."""
        target = self._ring.buffers[buffer, place]
        number = self._next_read
        self._next_read += 1
        layer, index = divmod(number, len(self._disk_slots))
        try:
            if self._reads is None:
                assert self._pages is not None
                self._pages.read(index, layer, self._ring.parts[buffer][place])
                return
            while not self._reads.is_started(number):  # its memory is still being copied from
                event, before = self._copied.popleft()
                event.synchronize()
                self._reads.free(before)
            target.copy_(self._reads.get(number), non_blocking=True)
        except StoreError as error:
            self.bad_reads[self._disk_slots[index]] = str(error)
            target.zero_()

    def _is_read(self, number: int) -> bool:
        """Whether the disk slices of the load that comes next are all there."""
        wanted = sum(run.count for run in self._loads[number % len(self._loads)] if run.tier is Tier.DISK)
        numbers = range(self._next_read, self._next_read + wanted)
        return self._reads is None or all(self._reads.is_read(number) for number in numbers)


def _runs(load: Load, longest: int) -> list[_Run]:
    runs: list[_Run] = []
    for index, place in enumerate(load):
        tier, slot = cold_place(place)
        last = runs[-1] if runs else None
        if last and last.tier is tier and slot == last.first_slot + last.count and last.count < longest:
            runs[-1] = _Run(tier, last.first_slot, last.first, last.count + 1)
        else:
            runs.append(_Run(tier, slot, index, 1))
    return runs
