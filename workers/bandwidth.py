"""How fast the tiers below the device give layer slices back, measured at start on the pools themselves."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from distkv.workers.tiers import RankTiers

PROBE_SECONDS = 0.02  # of copying from the host; the fastest copy counts, since others may use the machine
PROBE_BYTES = 2**25  # written to disk, and read back
READ_BYTES = 2**23  # at a time, of which the fastest counts


class Bandwidth(msgspec.Struct, array_like=True, frozen=True):
    """Bytes per second of one rank; 0 for a tier that is off."""

    host: float = 0.0
    disk: float = 0.0


def measure_bandwidth(tiers: RankTiers, folder: Path | None) -> Bandwidth:
    """Copies from the host through the staging ring's memory, and reads a file in `folder` past the page cache."""
    return Bandwidth(
        _host_bandwidth(tiers) if tiers.host.num_pages else 0.0,
        _disk_bandwidth(folder) if tiers.disk is not None and folder is not None else 0.0,
    )


def _host_bandwidth(tiers: RankTiers) -> float:
    target = tiers.ring.buffers[0]
    pages = min(len(target), tiers.host.num_pages)
    source = tiers.host.slices(0, pages, 0)
    source.zero_()  # memory that was never written is not there yet
    wait: Callable[[], None] = torch.cuda.synchronize if target.is_cuda else lambda: None

    def copy() -> None:
        target[:pages].copy_(source, non_blocking=True)

    copy()
    wait()
    first, fastest = time.perf_counter(), float("inf")
    while (start := time.perf_counter()) - first < PROBE_SECONDS:
        copy()
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return source.nbytes / fastest


def _disk_bandwidth(folder: Path) -> float:
    path = folder / f"probe.{os.getpid()}"
    block = bytearray(READ_BYTES)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError:
        return 0.0
    try:
        path.unlink()  # so that a kill leaves nothing
        for _ in range(PROBE_BYTES // READ_BYTES):
            os.write(descriptor, block)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        fastest = float("inf")
        for place in range(0, PROBE_BYTES, READ_BYTES):
            start = time.perf_counter()
            os.preadv(descriptor, [block], place)
            fastest = min(fastest, time.perf_counter() - start)
        return READ_BYTES / fastest
    except OSError:  # a full disk: what is there can still be read, nobody knows how fast
        return 0.0
    finally:
        os.close(descriptor)
