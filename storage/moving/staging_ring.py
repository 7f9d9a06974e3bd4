"""Streaming: layer slices of cold pages pass through a few small buffers on the device, in a fixed order.

The order is known when a step begins: all loads of layer 0, then all of layer 1, and so on. On a GPU copies run ahead
of it on a lane of their own, and disk reads ahead of them in threads (`LoadsAhead`). On a CPU both happen when their
turn comes, straight into the buffer (`LoadsInTurn`): threads would compete with compute for the same cores, and what
was just copied is read from the processor's cache. On either the system is asked to bring what comes next from disk
into its memory (`DiskPrefetch`).
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from distkv.storage.device import Device
from distkv.storage.dtypes import torch_dtype
from distkv.storage.errors import StoreError
from distkv.storage.meter import Meter, now
from distkv.storage.moving.lane_times import LaneTimes
from distkv.storage.moving.link import Way, sleep_until
from distkv.storage.moving.page_copies import PageCopies
from distkv.storage.moving.read_ahead import ReadAhead
from distkv.storage.moving.streams import Event, Lane
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, decode_location, decode_locations

if TYPE_CHECKING:
    from distkv.storage.pools.disk_pool import DiskPool
    from distkv.storage.pools.open_pages import OpenPages, Parts

Load = Sequence[int]
"""Cold locations (`encode_location`) that are brought side by side into one buffer."""

STREAMED = {tier: f"{tier.name.lower()}_streamed" for tier in Tier}  # routes through the ring, see `meter.py`


class Stream(Protocol):
    """The loads of one step: `take` gives them in order, once for every layer, and `close` must end it."""

    bad_reads: dict[int, str]  # disk slot -> why it could not be read

    def take(self) -> Tensor:
        """The next load: `[pages, 2, kv_head, page_size, head_dim]` on the device, until the next call but one.

        Pages that cannot be read back are zeros and noted in `bad_reads`, so that the ranks of a group stay in step.
        """

    def close(self) -> None:
        """Ends it, also for a step that has failed, after which loads may be left."""


class StagingRing:
    """The buffers `[buffer, buffer_pages, 2, kv_head, page_size, head_dim]` on the device of a rank, and what is to be
    known of them from one step to the next."""

    def __init__(
        self,
        spec: PageSpec,
        num_pages: int,
        host: HostPool,
        disk: "DiskPool | None",
        read_ahead: ReadAhead | None,
        device: Device,
        copies: PageCopies | None = None,
        filling: Callable[[], dict[int, Event]] = dict,
        meter: Meter | None = None,
        times: LaneTimes | None = None,
    ):
        """
        Args:
            num_pages: pages of NUM_BUFFERS buffers together; one layer's slice of each is held.
            read_ahead: for pages on disk, with memory for a buffer's at least; needed with `copies`.
            copies: of the device; None where the host fills each buffer by itself when its turn comes.
            filling: see `Mover.filling`, called once a step; needed with `copies`.
            meter: is told how long loads take.
            times: of the lanes of `copies`.
        """
        self.spec, self.host, self.disk, self.read_ahead = spec, host, disk, read_ahead
        self.copies, self.filling, self.meter = copies, filling, meter or Meter()
        self.times = times if times is not None or copies is None else LaneTimes(copies.streams, self.meter)
        self.buffer_pages = num_pages // NUM_BUFFERS
        self.num_buffers, self.link = device.num_buffers, device.link
        self.buffers = torch.zeros(
            self.num_buffers,
            self.buffer_pages,
            *spec.stored_slice_shape,
            dtype=torch_dtype(spec.stored_dtype),
            device=device.torch_device,
        )
        # both sides of the copies of a load as `PageCopies` takes them, by layer and by buffer
        self.sources = [] if copies is None else [host.layer_rows(layer) for layer in range(spec.num_layers)]
        self.targets = [buffer.flatten(1)[:, None] for buffer in self.buffers]
        self.num_loads = 0  # of all steps; load n goes to buffer n, counted round
        # by buffer, what must have happened before it is filled again: at first that it was made
        self.released = [] if copies is None else [copies.streams.record(Lane.COMPUTE)] * self.num_buffers
        self.parts: list[list[Parts]] = []  # of each page of each buffer, which is read into where it lies
        if disk is not None and copies is None:
            self.parts = [[disk.parts(one) for one in buffer] for buffer in self.buffers]
        self.bytes: Counter[Tier] = Counter()  # streamed so far, by where they came from

    def begin(self, loads: Sequence[Load]) -> Stream:
        """Starts bringing `loads`, each of at most `buffer_pages` pages, once for every layer. The stream before must
        be closed."""
        if self.copies is None:
            return LoadsInTurn(self, loads)
        stream = LoadsAhead(self, self.copies, loads)
        try:
            stream.go_on()
        except BaseException:
            stream.close()
            raise
        return stream

    def open(self, slots: Sequence[int]) -> "OpenPages | None":
        """The pages in these slots on disk, None when there are none."""
        if not slots:
            return None
        assert self.disk is not None
        return self.disk.open(slots)

    def count_slices(self, tier: Tier, num_slices: int) -> None:
        """Takes down that so many layer slices were streamed."""
        self.bytes[tier] += num_slices * self.spec.slice_bytes_in(tier)

    def count_heads(self, tier: Tier, num_slices: int) -> None:
        """The same of slices of a single KV head."""
        self.bytes[tier] += num_slices * self.spec.slice_bytes_in(tier) // self.spec.num_kv_heads

    def close(self) -> None:
        """Gives back the buffers, into which nothing may be on its way."""
        self.parts, self.sources, self.targets = [], [], []
        self.buffers = self.buffers[:0].clone()


# --- on a CPU ---


@dataclass(frozen=True)
class _Run:
    """Neighbouring slots of one tier that go to neighbouring pages of a buffer."""

    tier: Tier
    first_slot: int
    first_index: int  # in the buffer
    count: int

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + self.count)


class LoadsInTurn:
    """A `Stream` that fills each buffer when its turn comes. With a simulated link a load is there no sooner than that
    would have brought it, ahead of its turn as far as there are buffers."""

    def __init__(self, ring: StagingRing, loads: Sequence[Load]):
        self.bad_reads: dict[int, str] = {}
        self._ring = ring
        self._loads = [_runs(load) for load in loads]
        self._sizes = [len(load) for load in loads]
        self._pages = ring.open(
            [slot for runs in self._loads for run in runs if run.tier is Tier.DISK for slot in run.slots]
        )
        self._taken = 0
        self._on_disk = 0  # pages on disk of the layer that were brought already
        self._arrivals: list[int] = []  # with a link, of each load that is on its way or there

    def take(self) -> Tensor:
        number = self._taken
        self._taken += 1
        self._go_on(number + self._ring.num_buffers - 2)  # the buffer of the load before may be in use
        layer, load = divmod(number, len(self._loads))
        if load == 0:
            self._on_disk = 0
        buffer = number % self._ring.num_buffers
        for run in self._loads[load]:
            start = now()
            self._ring.count_slices(run.tier, run.count)
            if run.tier is Tier.HOST:
                source = self._ring.host.slices(run.first_slot, run.count, layer)
                self._ring.buffers[buffer, run.first_index : run.first_index + run.count].copy_(source)
            else:
                for index in range(run.count):
                    self._read(layer, run.first_slot + index, buffer, run.first_index + index)
            self._ring.meter.add(STREAMED[run.tier], start, layer=layer, pages=run.count)
        if self._arrivals:
            start = now()
            sleep_until(self._arrivals[number])
            self._ring.meter.add(STREAMED[Tier.HOST], start, layer=layer, pages=0)
        return self._ring.buffers[buffer, : self._sizes[load]]

    def close(self) -> None:
        if self._pages is not None:
            self._pages.close()

    def _go_on(self, last: int) -> None:
        """Has the link begin with all loads up to a last one, whose buffers are free from now on."""
        ring, ready = self._ring, now()
        if ring.link is None:
            return
        for number in range(len(self._arrivals), min(last + 1, len(self._loads) * ring.spec.num_layers)):
            num_bytes = self._sizes[number % len(self._sizes)] * ring.spec.slice_bytes_in(Tier.HOST)
            self._arrivals.append(ring.link.carry(Way.UP, num_bytes, ready))

    def _read(self, layer: int, slot: int, buffer: int, index: int) -> None:
        assert self._pages is not None
        try:
            self._pages.read(self._on_disk, layer, self._ring.parts[buffer][index])
        except StoreError as error:
            self.bad_reads[slot] = str(error)
            self._ring.buffers[buffer, index].zero_()
        self._on_disk += 1


def _runs(load: Load) -> list[_Run]:
    runs: list[_Run] = []
    for index, location in enumerate(load):
        tier, slot = decode_location(location)
        last = runs[-1] if runs else None
        if last and last.tier is tier and slot == last.first_slot + last.count:
            runs[-1] = _Run(tier, last.first_slot, last.first_index, last.count + 1)
        else:
            runs.append(_Run(tier, slot, index, 1))
    return runs


# --- on a GPU ---


class LoadsAhead:
    """A `Stream` whose copies are enqueued ahead of what computes, as far as there are buffers.

    What is enqueued waits on the device alone: a copy for the release of its buffer, and in the first layer for copies
    that fill its sources; what computes, for the load that it takes. A buffer is released by the next call of `take`
    but one, and at the end by `close`. So the first copies of a step run while that before it computes still. `take`
    waits on the host for one thing, the disk, if a load's turn has come and its pages are not read yet; and `close` for
    nothing, unless the step has failed and threads still read. What a failed step leaves on its way into buffers is
    read by nobody, and what fills them later comes behind it in the lane.
    """

    def __init__(self, ring: StagingRing, copies: PageCopies, loads: Sequence[Load]):
        self.bad_reads: dict[int, str] = {}
        self._ring, self._copies, self._streams = ring, copies, copies.streams
        self._filling = ring.filling()
        self._total = ring.spec.num_layers * len(loads)
        self._sizes = [len(load) for load in loads]
        on_disk, slots = decode_locations(np.concatenate([np.asarray(load, dtype=np.int64) for load in loads]))
        pages = np.column_stack([slots, np.concatenate([np.arange(size) for size in self._sizes])])  # slot, index
        edges = np.cumsum(self._sizes)
        self._on_disk = [part.tolist() for part in _parts(pages, on_disk, edges)]
        on_host = _parts(pages, ~on_disk, edges)
        self._on_host = copies.prepare_parts(
            Lane.LOAD, np.concatenate(on_host), [len(part) for part in on_host], ring.host.piece_pages
        )
        self._taken = self._staged = self._released = 0  # loads
        self._first = ring.num_loads
        self._ready: deque[Event] = deque()  # of loads that are staged and not taken
        self._read = 0  # slices from disk that were copied so far
        self._pages = ring.open([slot for part in self._on_disk for slot, _ in part])
        self._reads = None
        if self._pages is not None:
            assert ring.read_ahead is not None
            try:
                self._reads = ring.read_ahead.begin(self._pages, sum(map(len, self._on_disk)), ring.buffer_pages)
            except BaseException:
                self._pages.close()
                raise

    def take(self) -> Tensor:
        number = self._taken
        self._taken += 1
        self._release(number - 1)
        self.go_on()
        self._streams.wait(Lane.COMPUTE, self._ready.popleft())
        return self._ring.buffers[self._buffer(number), : self._sizes[number % len(self._sizes)]]

    def go_on(self) -> None:
        """Enqueues what there are buffers for; of loads whose turn has not come, those whose pages are read."""
        while self._staged < min(self._released + self._ring.num_buffers, self._total):
            if self._staged >= self._taken and not self._is_read(self._staged):
                break
            self._stage(self._staged)
            self._staged += 1

    def close(self) -> None:
        self._release(self._staged)
        self._ring.num_loads += self._staged
        try:
            if self._reads is not None:
                self._reads.close(self._streams.record(Lane.LOAD))
        finally:
            if self._pages is not None:
                self._pages.close()

    def _release(self, before: int) -> None:
        """Lets the buffers of earlier loads be filled again, behind all that is enqueued to be computed."""
        while self._released < before:
            self._ring.released[self._buffer(self._released)] = self._streams.record(Lane.COMPUTE)
            self._released += 1

    def _stage(self, number: int) -> None:
        ring = self._ring
        layer, load = divmod(number, len(self._sizes))
        on_host, on_disk = self._on_host[load], self._on_disk[load]
        self._streams.wait(Lane.LOAD, ring.released[self._buffer(number)])
        if layer == 0 and self._filling:
            for slot in self._filling.keys() & on_host.rows[:, 0].tolist():
                self._streams.wait(Lane.LOAD, self._filling[slot])
        assert ring.times is not None
        ready = begun = ring.times.begin(Lane.LOAD)
        if len(on_host.rows):
            self._copies.start(Lane.LOAD, ring.sources[layer], ring.targets[self._buffer(number)], on_host)
            ready = ring.times.end(Lane.LOAD, begun, STREAMED[Tier.HOST], layer=layer, pages=len(on_host.rows))
        for slot, index in on_disk:
            self._copy_read(slot, ring.buffers[self._buffer(number), index])
        if on_disk:
            ready = ring.times.end(Lane.LOAD, ready, STREAMED[Tier.DISK], layer=layer, pages=len(on_disk))
        self._ready.append(ready)
        if self._reads is not None and on_disk:
            self._reads.free(self._read, self._ready[-1])
        ring.count_slices(Tier.HOST, len(on_host.rows))
        ring.count_slices(Tier.DISK, len(on_disk))

    def _copy_read(self, slot: int, target: Tensor) -> None:
        """Brings the next slice that comes from disk, in one piece: the disk is slower than any way of copying."""
        assert self._reads is not None
        try:
            source = self._reads.get(self._read)
            self._streams.run(Lane.LOAD, partial(target.copy_, source, non_blocking=True))
        except StoreError as error:
            self.bad_reads[slot] = str(error)
            self._streams.run(Lane.LOAD, target.zero_)
        self._read += 1

    def _is_read(self, number: int) -> bool:
        """Whether the disk slices of the load that comes next are all there."""
        wanted = len(self._on_disk[number % len(self._sizes)])
        return self._reads is None or all(self._reads.is_read(self._read + index) for index in range(wanted))

    def _buffer(self, number: int) -> int:
        return (self._first + number) % self._ring.num_buffers


def _parts(pages: np.ndarray, chosen: np.ndarray, edges: np.ndarray) -> list[np.ndarray]:
    """The chosen rows of each load, whose pages end at `edges`."""
    return np.split(pages[chosen], np.concatenate([[0], np.cumsum(chosen)])[edges[:-1]])
