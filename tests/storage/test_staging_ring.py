"""Streaming: a step gets just the slices that it asked for, in order, from whichever tier and however slow."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.damage import flip_bit
from support.gated_pools import WAIT, GatedDisk
from support.pages import SPEC, random_page, same
from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.device import CpuDevice
from distkv.storage.disk.disk_array import make_array
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.moving.read_ahead import READ_THREADS, ReadAhead, Reads
from distkv.storage.moving.staging_ring import StagingRing, Stream
from distkv.storage.paging import CPU_BUFFERS, NUM_BUFFERS
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.pools.open_pages import OpenPages, Parts
from distkv.storage.tier import Tier, decode_location, encode_location

NUM_PAGES = 9
LOST = 4  # a disk slot that cannot be read


HEADS = DiskShare.of_all(SPEC)
PAGES = {(tier, slot): random_page(SPEC, 100 * tier + slot) for tier in Tier for slot in range(NUM_PAGES)}


class SlowDisk(DiskPool):
    """Reads take longer or shorter, so that they end in any order; they are noted as `(layer, slot)`."""

    def start_over(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.reads: list[tuple[int, int]] = []
        self.num_open = 0

    def open(self, slots: Sequence[int]) -> OpenPages:
        return SlowPages(self, slots)


class SlowPages(OpenPages):
    def __init__(self, pool: SlowDisk, slots: Sequence[int]):
        super().__init__(pool, slots)
        self.pool, self.slots = pool, list(slots)
        pool.num_open += 1

    def read(self, index: int, layer: int, parts: Parts) -> None:
        self.pool.reads.append((layer, self.slots[index]))
        time.sleep(self.pool.rng.choice([0, 0, 0, 0.001, 0.002]))
        super().read(index, layer, parts)

    def close(self) -> None:
        self.pool.num_open -= 1
        super().close()


Disk = TypeVar("Disk", bound=DiskPool)


def make_disk(kind: type[Disk], folder: Path, lost: bool = False) -> Disk:
    """A disk tier full of pages; with `lost`, one of them is missing."""
    make_array(folder, SPEC, NUM_PAGES)
    disk = kind(SPEC, folder, NUM_PAGES, HEADS)
    for slot in range(NUM_PAGES):
        disk.store(slot, PAGES[Tier.DISK, slot])
    if lost:
        disk.chunk_path(LOST, 0).unlink()
    return disk


@pytest.fixture(scope="module")
def slow_disks(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, SlowDisk]:
    """One without and one with a lost page."""
    return {lost: make_disk(SlowDisk, tmp_path_factory.mktemp("cache"), lost) for lost in (False, True)}


@pytest.fixture(scope="module")
def host() -> HostPool:
    host = HostPool(SPEC, NUM_PAGES, pinned=False)
    for slot in range(NUM_PAGES):
        host.page(slot).copy_(PAGES[Tier.HOST, slot])
    return host


@contextmanager
def make_ring(host: HostPool, disk: DiskPool | None, buffer_pages: int) -> Iterator[StagingRing]:
    ring = StagingRing(SPEC, buffer_pages * NUM_BUFFERS, host, disk, None, CpuDevice())
    yield ring
    ring.close()


def check(stream: Stream, loads: list[list[int]], lost: bool = False) -> None:
    """Takes everything; what was taken before stays until the next call but one."""
    previous: tuple[Tensor, Tensor] | None = None
    for layer in range(SPEC.num_layers):
        for load in loads:
            taken = stream.take()
            expected = torch.stack([slice_of(place, layer, lost) for place in load])
            assert same(taken, expected)
            if previous is not None:
                assert same(*previous)
            previous = taken, expected


def slice_of(place: int, layer: int, lost: bool) -> Tensor:
    if lost and decode_location(place) == (Tier.DISK, LOST):
        return torch.zeros(SPEC.slice_shape)
    return PAGES[decode_location(place)][layer]


def places(tier: Tier, *slots: int) -> list[int]:
    return [encode_location(tier, slot) for slot in slots]


def streamed(loads: list[list[int]], tier: Tier) -> int:
    """Bytes that come from a tier, over all layers."""
    return sum(decode_location(place)[0] is tier for load in loads for place in load) * SPEC.page_bytes


COLD = st.builds(encode_location, st.sampled_from([Tier.HOST, Tier.DISK]), st.integers(0, NUM_PAGES - 1))
RUNS = st.builds(  # neighbours, which are moved in one go
    lambda tier, first, count: [encode_location(tier, slot) for slot in range(first, min(first + count, NUM_PAGES))],
    st.sampled_from([Tier.HOST, Tier.DISK]),
    st.integers(0, NUM_PAGES - 1),
    st.integers(1, 4),
)
LOADS = st.lists(st.one_of(st.lists(COLD, min_size=1, max_size=4), RUNS), min_size=1, max_size=6)


# --- the ring ---


@example([[[*places(Tier.HOST, 3), *places(Tier.DISK, 4), *places(Tier.HOST, 5, 6)]]], 4, False, 0)
@given(st.lists(LOADS, min_size=1, max_size=3), st.integers(4, 6), st.booleans(), st.integers())
def test_a_step_gets_what_it_asked_for(
    slow_disks: dict[bool, SlowDisk],
    host: HostPool,
    steps: list[list[list[int]]],
    buffer_pages: int,
    lost: bool,
    seed: int,
) -> None:
    """Any loads; one ring for all steps."""
    disk = slow_disks[lost]
    with make_ring(host, disk, buffer_pages) as ring:
        total = {Tier.HOST: 0, Tier.DISK: 0}
        for loads in steps:
            disk.start_over(seed)
            stream = ring.begin(loads)
            check(stream, loads, lost)
            stream.close()
            assert disk.num_open == 0
            for tier in total:
                total[tier] += streamed(loads, tier)
                assert ring.bytes[tier] == total[tier]
            on_disk = [slot for load in loads for tier, slot in map(decode_location, load) if tier is Tier.DISK]
            assert disk.reads == [(layer, slot) for layer in range(SPEC.num_layers) for slot in on_disk]
            bad = {LOST} if lost and LOST in on_disk else set()
            assert set(stream.bad_reads) == bad
            assert all("cannot be read: No such file" in reason for reason in stream.bad_reads.values())


def test_a_closed_stream_leaves_nothing_behind(slow_disks: dict[bool, SlowDisk], host: HostPool) -> None:
    """The next step of the same ring is right wherever the last one stopped."""
    disk = slow_disks[False]
    loads = [places(Tier.DISK, 0, 1, 2), places(Tier.HOST, 4), places(Tier.DISK, 3, 4, 5)]
    others = [places(Tier.DISK, 8, 7, 6), places(Tier.HOST, 2, 3)]
    with make_ring(host, disk, buffer_pages=3) as ring:
        for taken in range(len(loads) * SPEC.num_layers):
            disk.start_over(taken)
            stream = ring.begin(loads)
            for _ in range(taken):
                stream.take()
            stream.close()
            assert disk.num_open == 0
            count = len(disk.reads)
            stream = ring.begin(others)
            check(stream, others)
            stream.close()
            assert len(disk.reads) - count == 3 * SPEC.num_layers


def test_without_a_disk(host: HostPool) -> None:
    loads = [places(Tier.HOST, 0, 1, 2), places(Tier.HOST, 8, 4)]
    with make_ring(host, None, buffer_pages=3) as ring:
        stream = ring.begin(loads)
        check(stream, loads)
        stream.close()
        assert ring.bytes == {Tier.HOST: 5 * SPEC.page_bytes} and stream.bad_reads == {}


def test_an_unreadable_page_is_zeros_and_is_noted(tmp_path: Path, host: HostPool) -> None:
    disk = make_disk(DiskPool, tmp_path, lost=True)
    loads = [places(Tier.DISK, 3, LOST, 5), places(Tier.HOST, LOST)]
    with make_ring(host, disk, buffer_pages=3) as ring:
        ring.buffers.fill_(7)
        stream = ring.begin(loads)
        check(stream, loads, lost=True)
        stream.close()
        assert list(stream.bad_reads) == [LOST]
        with pytest.raises(StoreError) as error:
            disk.load(LOST, torch.empty(SPEC.page_shape))
        assert stream.bad_reads[LOST] == str(error.value)


def test_damage_in_one_layer(tmp_path: Path, host: HostPool) -> None:
    """The other layers are right, and what was read of the damaged one is not used."""
    disk = make_disk(DiskPool, tmp_path)
    flip_bit(disk.chunk_path(2, 0))  # in layer 1
    with make_ring(host, disk, buffer_pages=3) as ring:
        stream = ring.begin([places(Tier.DISK, 2)])
        expected = PAGES[Tier.DISK, 2].clone()
        expected[1] = 0
        assert same(torch.stack([stream.take()[0].clone() for _ in range(SPEC.num_layers)]), expected)
        stream.close()
        assert "checksum of layer 1 is wrong" in stream.bad_reads[2]


def test_memory_is_given_back(host: HostPool) -> None:
    ring = StagingRing(SPEC, 3 * NUM_BUFFERS, host, None, None, CpuDevice())
    assert ring.buffers.shape == (CPU_BUFFERS, 3, *SPEC.slice_shape)
    ring.close()
    assert ring.buffers.untyped_storage().nbytes() == 0


# --- reading ahead, which a GPU uses ---


class Copied(threading.Event):
    """The end of a copy."""

    def query(self) -> bool:
        return self.is_set()

    def synchronize(self) -> None:
        assert self.wait(WAIT)


def copied() -> Copied:
    """A copy that has ended."""
    event = Copied()
    event.set()
    return event


@contextmanager
def make_read_ahead(disk: DiskPool, num_slices: int) -> Iterator[ReadAhead]:
    memory = ReadAhead(SPEC, num_slices, disk, pinned=False)
    yield memory
    memory.close()
    assert memory.buffer.data.numel() == 0


@contextmanager
def begin(memory: ReadAhead, disk: DiskPool, slots: list[int], longest: int) -> Iterator[Reads]:
    pages = disk.open(slots)
    reads = memory.begin(pages, len(slots), longest)
    yield reads
    reads.close(copied())
    pages.close()


def check_slice(reads: Reads, number: int, slots: list[int], lost: bool = False) -> None:
    layer, index = divmod(number, len(slots))
    if lost and slots[index] == LOST:
        with pytest.raises(StoreError, match="cannot be read: No such file"):
            reads.get(number)
    else:
        assert same(reads.get(number), PAGES[Tier.DISK, slots[index]][layer])


@given(
    st.lists(st.integers(0, NUM_PAGES - 1), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(0, 20),
    st.booleans(),
    st.integers(),
)
def test_slices_come_in_order(
    slow_disks: dict[bool, SlowDisk], slots: list[int], longest: int, more: int, lost: bool, seed: int
) -> None:
    """With more to read than there is memory for and with less, and `longest` slices in use at a time."""
    disk = slow_disks[lost]
    disk.start_over(seed)
    rng = random.Random(seed)
    total = SPEC.num_layers * len(slots)
    with make_read_ahead(disk, longest + more) as memory, begin(memory, disk, slots, longest) as reads:
        first = 0
        while first < total:
            last = min(first + rng.randint(1, longest), total)
            for number in rng.sample(range(first, last), last - first):
                check_slice(reads, number, slots, lost)
                assert reads.is_read(number)
            for number in range(first, last):  # they stay until they are freed
                check_slice(reads, number, slots, lost)
            reads.free(last, copied())
            first = last
    assert sorted(disk.reads) == sorted((layer, slot) for layer in range(SPEC.num_layers) for slot in slots)


def test_reads_run_ahead_as_far_as_there_is_memory(slow_disks: dict[bool, SlowDisk]) -> None:
    disk = slow_disks[False]
    disk.start_over(0)
    slots = [3, 4, 5, 0, 8]
    with make_read_ahead(disk, 7) as memory, begin(memory, disk, slots, longest=3) as reads:
        for number in range(7):
            check_slice(reads, number, slots)
        assert not reads.is_read(7) and len(disk.reads) == 7
        reads.free(1, copied())
        memory.threads.shutdown()  # all reads that were asked for have ended
        assert sorted(disk.reads) == [(0, 0), (0, 3), (0, 4), (0, 5), (0, 8), (1, 3), (1, 4), (1, 5)]


def test_reads_end_early(slow_disks: dict[bool, SlowDisk]) -> None:
    """The memory serves the next step whatever the last one left in it."""
    disk = slow_disks[False]
    with make_read_ahead(disk, 8) as memory:
        for taken in range(8):
            disk.start_over(taken)
            with begin(memory, disk, [0, 1, 2, 3, 4], longest=1) as reads:
                for number in range(taken):
                    check_slice(reads, number, [0, 1, 2, 3, 4])
                    reads.free(number + 1, copied())
            with begin(memory, disk, [8, 7], longest=2) as reads:
                for number in range(2 * SPEC.num_layers):
                    check_slice(reads, number, [8, 7])
                    reads.free(number + 1, copied())


def test_memory_is_read_into_once_it_is_copied(slow_disks: dict[bool, SlowDisk]) -> None:
    """By the threads, in this step and in the next; whoever frees it does not wait."""
    disk = slow_disks[False]
    disk.start_over(0)
    copies = [Copied() for _ in range(6)]
    with make_read_ahead(disk, 2) as memory:
        pages = disk.open([3, 4])
        reads = memory.begin(pages, 2, longest=1)
        for number in range(2 * SPEC.num_layers):
            place = reads.get(number)
            if number >= 1:
                reads.free(number, copies[number - 1])
            if number >= 2:
                assert not reads.is_read(number + 1)
            assert same(place, PAGES[Tier.DISK, 3 + number % 2][number // 2])
            if number >= 1:
                copies[number - 1].set()
        reads.close(copies[-1])
        pages.close()
        with begin(memory, disk, [8], longest=1) as others:
            check_slice(others, 0, [8])  # in the place whose copy has ended
            time.sleep(0.02)  # a thread that does not wait has read by now
            assert not others.is_read(1)
            copies[-1].set()
            check_slice(others, 1, [8])


def test_close_waits_for_reads_that_run_and_calls_off_the_others(tmp_path: Path) -> None:
    disk = make_disk(GatedDisk, tmp_path)
    disk.gate.clear()
    with make_read_ahead(disk, 7) as memory:
        pages = disk.open([0, 1, 2, 3, 5, 6, 7])
        reads = memory.begin(pages, 7, longest=1)
        for _ in range(READ_THREADS):
            assert disk.begun.acquire(timeout=WAIT)
        assert not reads.is_read(0)
        ending = threading.Thread(target=reads.close, args=(copied(),))
        ending.start()
        deadline = time.monotonic() + WAIT
        while not list(reads._tasks.values())[-1].cancelled():
            assert ending.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        disk.gate.set()
        ending.join(WAIT)
        assert not ending.is_alive()
        assert not disk.begun.acquire(blocking=False)  # the last ones were never read
        pages.close()
