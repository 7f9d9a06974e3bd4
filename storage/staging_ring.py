"""Streaming: layer slices of cold pages pass through a few small buffers on the device, in a fixed order.

The order is known when a step begins: all loads of layer 0, then all of layer 1, and so on. Disk reads run ahead of it
as far as the read-ahead memory reaches, in threads; on CUDA, copies to the device run ahead of compute by a buffer, on
a stream of their own. On a CPU the copy is made when its turn comes: in a thread it would compete with compute for the
same cores, and what was just copied is read from the processor's cache.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.host_memory import HostBuffer
from distkv.storage.host_pool import HostPool
from distkv.storage.page_pool import PagePool
from distkv.storage.page_size import NUM_BUFFERS
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier, cold_place

READ_THREADS = 4

Load = Sequence[int]
"""Cold places (`tier.location`) that are brought side by side into one buffer."""


class StagingRing:
    """The buffers `[NUM_BUFFERS, buffer_pages, 2, kv_head, page_size, head_dim]` on the device of a rank."""

    def __init__(
        self,
        spec: PageSpec,
        num_pages: int,
        read_ahead: int,
        host: HostPool,
        disk: PagePool | None,
        device: torch.device,
    ):
        """
        Args:
            num_pages: pages of all buffers together; one layer's slice of each is held.
            read_ahead: layer slices of host memory for what is read from disk; at least a buffer's where there is one.
        """
        assert disk is None or read_ahead >= num_pages // NUM_BUFFERS
        self.spec, self.host, self.disk = spec, host, disk
        self.buffer_pages = num_pages // NUM_BUFFERS
        self.buffers = torch.zeros(
            NUM_BUFFERS, self.buffer_pages, *spec.slice_shape, dtype=spec.dtype, device=device
        )  # fmt: skip
        on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self.read_ahead = HostBuffer((read_ahead, *spec.slice_shape), spec.dtype, pinned=on_cuda)
        self.threads = ThreadPoolExecutor(READ_THREADS, "kv-read")
        self.bytes: Counter[Tier] = Counter()  # streamed so far, by where they came from

    def begin(self, loads: Sequence[Load]) -> "Stream":
        """Starts bringing `loads`, each of at most `buffer_pages` places, once for every layer."""
        return Stream(self, loads)

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.read_ahead.close()
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
        self._ahead = 1 if ring.stream is None else NUM_BUFFERS
        self._taken = self._staged = 0
        self._unread = self._disk_slices()
        self._reads: deque[tuple[Future[None], int, int]] = deque()  # read, its place in the read-ahead, disk slot
        self._free = deque(range(len(ring.read_ahead.data)))
        self._leaving: deque[tuple[torch.cuda.Event, list[int]]] = deque()  # places that CUDA still copies from
        self._ready: deque[torch.cuda.Event] = deque()
        self._released: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self.bad_reads: dict[int, str] = {}  # disk slot -> why it could not be read
        if ring.stream is not None:  # the step before may still be reading the buffers
            ring.stream.wait_stream(torch.cuda.current_stream())
        self._read_ahead()

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
        """Waits for reads on their way, which a step that failed leaves behind."""
        for read, _, _ in self._reads:
            read.cancel()
        wait([read for read, _, _ in self._reads if not read.cancelled()])
        if self._ring.stream is not None:
            self._ring.stream.synchronize()

    def _stage(self, number: int) -> None:
        ring = self._ring
        layer, load = divmod(number, len(self._loads))
        buffer = ring.buffers[number % NUM_BUFFERS]
        if ring.stream is None:
            self._fill(buffer, layer, load)
            return
        with torch.cuda.stream(ring.stream):
            released = self._released[number % NUM_BUFFERS]
            if released is not None:
                ring.stream.wait_event(released)
            leaving = self._fill(buffer, layer, load)
            ready = torch.cuda.Event()
            ready.record()
        self._ready.append(ready)
        self._leaving.append((ready, leaving))

    def _fill(self, buffer: Tensor, layer: int, load: int) -> list[int]:
        """Copies a load; returns the read-ahead places that an asynchronous copy still reads."""
        ring, leaving = self._ring, []
        for run in self._loads[load]:
            ring.bytes[run.tier] += run.count * ring.spec.layer_slice_bytes
            if run.tier is Tier.HOST:
                source = ring.host.slices(run.first_slot, run.count, layer)
                buffer[run.first : run.first + run.count].copy_(source, non_blocking=True)
                continue
            for place in range(run.first, run.first + run.count):
                self._read_ahead(1)
                read, source_place, slot = self._reads.popleft()
                try:
                    read.result()
                except StoreError as error:
                    self.bad_reads[slot] = str(error)
                    buffer[place].zero_()
                else:
                    buffer[place].copy_(ring.read_ahead.data[source_place], non_blocking=True)
                if ring.stream is None:
                    self._free.append(source_place)
                    self._read_ahead()
                else:
                    leaving.append(source_place)
        self._read_ahead()
        return leaving

    def _is_read(self, number: int) -> bool:
        """Whether the disk slices of a load that comes next are all there."""
        wanted = sum(run.count for run in self._loads[number % len(self._loads)] if run.tier is Tier.DISK)
        return len(self._reads) >= wanted and all(self._reads[index][0].done() for index in range(wanted))

    def _read_ahead(self, at_least: int = 0) -> None:
        """Starts reads while there is memory for them; waits for memory until `at_least` are on their way."""
        ring = self._ring
        while True:
            while self._leaving and (self._leaving[0][0].query() or (not self._free and len(self._reads) < at_least)):
                event, places = self._leaving.popleft()
                event.synchronize()
                self._free.extend(places)
            item = next(self._unread, None) if self._free else None
            if item is None:
                return
            layer, slot = item
            place = self._free.popleft()
            assert ring.disk is not None
            read = ring.threads.submit(ring.disk.load_layer, slot, layer, ring.read_ahead.data[place])
            self._reads.append((read, place, slot))

    def _disk_slices(self) -> Iterator[tuple[int, int]]:
        """`(layer, disk slot)` in the order of need."""
        slots = [
            slot
            for load in self._loads
            for run in load
            if run.tier is Tier.DISK
            for slot in range(run.first_slot, run.first_slot + run.count)
        ]
        return ((layer, slot) for layer in range(self._ring.spec.num_layers) for slot in slots)


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
