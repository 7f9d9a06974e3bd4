"""How fast pages move, measured at start on the pools themselves: which way of copying is the faster one between host
and GPU, and how fast the tiers below the device give layer slices back."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.library import Library
from distkv.kernels.native.page_states import ITEM_COLUMNS, page_states, state_width
from distkv.kernels.native.paged_attention import CodedPages
from distkv.kernels.page_entries import buffer_entry
from distkv.storage.dtypes import torch_dtype
from distkv.storage.moving.page_copies import Gather, PageCopies
from distkv.storage.moving.streams import Lane
from distkv.storage.pools.host_memory import as_integers
from distkv.storage.synthetic_pages import synthetic_slice
from distkv.storage.tier import Tier
from distkv.workers.kv_pools import KVPools
from distkv.workers.sizes import Bandwidth

if TYPE_CHECKING:
    from distkv.storage.pools.disk_pool import DiskPool  # imports zarr

log = logging.getLogger(__name__)

PROBE_SECONDS = 0.02  # of copying; the fastest copy counts, since others may use the machine
PROBE_PAGES = 8  # of a whole-page copy
ENQUEUED_BYTES = 2**26  # on a GPU, in copies one behind the other, so that what begins and ends them counts little
ENQUEUED_COPIES = 2, 32  # at least and at most
KERNEL_GAIN = 1.1  # by which the kernel must be faster, since it takes processors of the GPU from what computes
ATTENDED_BYTES = 2**28  # of pages of the host at most, which no cache of a processor holds for long
PROBE_BYTES = 2**25  # written to disk at most, and read back
READ_BYTES = 2**23  # at a time, of which the fastest counts
PROBE_SHARE = 1 / 32  # of a rank's disk tier; where that is less than READ_BYTES, all of it is read in about a second
FREE_PROBES = 8  # times what is written must be free, since others need room too


def measure_bandwidth(pools: KVPools) -> Bandwidth:
    """Copies from the host through the staging ring's memory, and reads a file beside the disk tier past the page
    cache; what is compressed there is waited for and then decoded."""
    disk = 0.0
    if pools.disk is not None:
        disk = disk_bandwidth(pools.disk.folder, int(pools.disk.nbytes * PROBE_SHARE))
        if disk and pools.disk.spec.disk_codec != "none":
            disk = _decoded_bandwidth(pools.disk, disk)
    return Bandwidth(_host_bandwidth(pools) if pools.host.num_pages else 0.0, disk)


def choose_copies(pools: KVPools, kernel: Gather) -> None:
    """Chooses for each lane of a GPU whether the copy engine or the kernel copies, and logs what they reach. With a
    codec whole pages cross by its kernels, whatever these reach. To be
    called before any page is stored: it copies pages of zeros about."""
    copies = pools.copies
    if copies is None or not pools.host.num_pages:
        return
    copies.streams.synchronize()  # the pools are being filled with zeros
    lanes = [Lane.LOAD] if pools.device.codec is not None else [Lane.LOAD, Lane.FETCH, Lane.SPILL]
    for lane in lanes:
        source, target = _ends(pools, lane)
        rows = [(row, row) for row in range(min(len(source), len(target)))][
            : None if lane is Lane.LOAD else PROBE_PAGES
        ]
        copies.kernels.pop(lane, None)
        engine_rate = _rate(pools, copies, lane, rows)
        copies.kernels[lane] = kernel
        kernel_rate = _rate(pools, copies, lane, rows)
        if kernel_rate < KERNEL_GAIN * engine_rate:
            del copies.kernels[lane]
        log.info(
            "to %s, the copy engine reaches %.1f GB/s and the gather kernel %.1f: the %s is used",
            lane.value, engine_rate / 1e9, kernel_rate / 1e9, "kernel" if lane in copies.kernels else "engine",
        )  # fmt: skip


def _host_bandwidth(pools: KVPools) -> float:
    if pools.copies is not None:
        source, target = _ends(pools, Lane.LOAD)
        rows = [(row, row) for row in range(min(len(source), len(target)))]
        return _rate(pools, pools.copies, Lane.LOAD, rows)
    buffer = pools.ring.buffers[0]
    pages = min(len(buffer), pools.host.num_pages)
    slices = pools.host.slices(0, pages, 0)
    slices.zero_()  # memory that was never written is not there yet
    copied = slices.nbytes / fastest(partial(seconds_of, partial(buffer[:pages].copy_, slices)))
    return copied if pools.ring.link is None else min(copied, pools.ring.link.bytes_per_second)


def host_attention_rate(library: Library, pools: KVPools, num_heads: int) -> float:
    """Bytes per second at which one token meets pages of the host's pool, layer after layer, with all threads."""
    spec, host = pools.spec, pools.host
    count = min(host.num_pages, max(1, ATTENDED_BYTES // spec.page_bytes_in(Tier.HOST)))
    for slot in range(count):
        host.page(slot).zero_()  # what was never written is the system's one page of zeros
    dtype = torch_dtype(spec.dtype)
    q = torch.zeros(1, num_heads, spec.head_dim, dtype=dtype)
    pool = torch.zeros(2, 1, spec.num_kv_heads, spec.page_size, spec.head_dim, dtype=dtype)
    items = torch.zeros(count, ITEM_COLUMNS, dtype=torch.int64)
    items[:, 1], items[:, 2], items[:, 5] = 1, spec.page_size - 1, -1
    items[:, 4] = torch.from_numpy(buffer_entry(np.arange(count)))
    items[:, 6] = torch.arange(count)
    states = torch.empty(count, num_heads, state_width(spec.head_dim))
    coded = None if spec.format is None else CodedPages(spec.format, pool[0])
    layers = cycle(range(spec.num_layers))

    def attend() -> None:
        page_states(library, q, pool, host.slices(0, count, next(layers)), items, states, coded)

    return count * spec.slice_bytes_in(Tier.HOST) / fastest(partial(seconds_of, attend))


def _decoded_bandwidth(disk: "DiskPool", rate: float) -> float:
    """Bytes of KV per second that one thread has of a disk of so many bytes per second, by a page's head of normal
    numbers that lies in memory."""
    spec, codec = disk.spec, disk.codec
    numbers = synthetic_slice(0, 0, range(1), spec.page_size, spec.head_dim, torch.device("cpu"))[:, 0]
    head = numbers.to(torch_dtype(spec.dtype)).expand(spec.num_layers, *numbers.shape).contiguous()
    content, layer = codec.encode(as_integers(head)), memoryview(bytearray(head[0].nbytes))
    pieces = [layer[: len(layer) // 2], layer[len(layer) // 2 :]]
    descriptor = os.memfd_create("distkv-probe")
    try:
        os.write(descriptor, content)
        index = codec.read_index(descriptor)
        seconds = fastest(partial(seconds_of, partial(codec.read, descriptor, index, 0, pieces)))
    finally:
        os.close(descriptor)
    return head.nbytes / (len(content) / rate + spec.num_layers * seconds)


def _ends(pools: KVPools, lane: Lane) -> tuple[Tensor, Tensor]:
    """Source and target of a lane's copies, as `PageCopies` takes them."""
    if lane is Lane.LOAD:
        return pools.host.layer_rows(0), pools.ring.buffers[0].flatten(1)[:, None]
    if lane is Lane.FETCH:
        return pools.host.rows(), pools.device.rows()
    return pools.device.rows(), pools.host.rows()


def _rate(pools: KVPools, copies: PageCopies, lane: Lane, rows: list[tuple[int, int]]) -> float:
    """Bytes per second by the device's own clock, while the host enqueues one copy after the other."""
    if not rows:
        return 0.0
    source, target = _ends(pools, lane)
    pairs = copies.prepare(lane, rows, pools.host.piece_pages)
    size = len(rows) * source[0].nbytes
    least, most = ENQUEUED_COPIES
    count = min(max(ENQUEUED_BYTES // size, least), most)

    def enqueue() -> None:
        for _ in range(count):
            copies.start(lane, source, target, pairs)

    return count * size / fastest(partial(copies.streams.seconds, lane, enqueue))


def seconds_of(copy: Callable[[], object]) -> float:
    """Of a copy that the host makes itself."""
    start = time.perf_counter()
    copy()
    return time.perf_counter() - start


def fastest(measure: Callable[[], float]) -> float:
    """The least of many measurements in seconds."""
    measure()
    first, fastest = time.perf_counter(), float("inf")
    while True:
        fastest = min(fastest, measure())
        if time.perf_counter() - first > PROBE_SECONDS:
            return fastest


def disk_bandwidth(folder: Path, room: int) -> float:
    """Of a file of `room` bytes at most; 0 where that is too little to tell, or the disk too full."""
    num_reads = min(PROBE_BYTES, room) // READ_BYTES
    block = bytearray(READ_BYTES)
    try:
        if not num_reads or shutil.disk_usage(folder).free < FREE_PROBES * num_reads * READ_BYTES:
            return 0.0
        # no other rank's, on whichever node, and gone with the process
        with TemporaryFile(dir=folder, prefix="probe.", buffering=0) as file:
            descriptor = file.fileno()
            for _ in range(num_reads):
                os.write(descriptor, block)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            fastest = float("inf")
            for index in range(num_reads):
                start = time.perf_counter()
                if os.preadv(descriptor, [block], index * READ_BYTES) < READ_BYTES:
                    return 0.0  # the disk has taken less than that
                fastest = min(fastest, time.perf_counter() - start)
            return READ_BYTES / fastest
    except OSError:  # somebody else has filled the disk
        return 0.0
