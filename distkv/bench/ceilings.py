"""What the machine gives without distkv: a plain copy of as many bytes, and plain reads of the same files."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from distkv.storage.moving.streams import CudaStreams, Lane
from distkv.storage.pools.host_memory import HostBuffer

READ_THREADS = 4
WARM_UP = 2
COPIES = 4


class CopyCeiling:
    """Two buffers: on a CPU both are memory of the host, with CUDA pinned memory is copied to the device."""

    def __init__(self, num_bytes: int):
        """`num_bytes` is the most that will be copied. Raises CapacityError when the host has no such memory."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._streams = CudaStreams(device) if device.type == "cuda" else None
        self._source = HostBuffer((1, num_bytes), torch.uint8, pinned=self._streams is not None)  # one piece
        self._source.data.fill_(1)  # has the system map it
        self._target = torch.ones(num_bytes, dtype=torch.uint8, device=device)

    def seconds(self, num_bytes: int) -> float:
        """Time of one copy, after others that warm up; with CUDA by its own clock, of copies one behind the other."""
        for _ in range(WARM_UP):
            self._copy(num_bytes, 1)
        if self._streams is not None:
            return self._streams.seconds(Lane.COMPUTE, partial(self._copy, num_bytes, COPIES)) / COPIES
        start = time.perf_counter()
        self._copy(num_bytes, 1)
        return time.perf_counter() - start

    def close(self) -> None:
        """Frees the buffers."""
        self._source.close()
        self._target = self._target[:0].clone()

    def _copy(self, num_bytes: int, count: int) -> None:
        for _ in range(count):
            self._target[:num_bytes].copy_(self._source.data[0, :num_bytes], non_blocking=True)


class ReadCeiling:
    """Reads chunk files of the disk tier with preadv in READ_THREADS threads, each into a buffer that it uses again."""

    def __init__(self, files: list[Path], num_layers: int):
        """Each file holds the slices of `num_layers` layers one after the other, and may be written anew meanwhile;
        what is compressed has about the same size then."""
        self._files = files
        self.num_bytes = sum(size for _, size in self._sizes())
        self._num_layers = num_layers
        self._threads = ThreadPoolExecutor(READ_THREADS)
        largest = max(size for _, size in self._sizes())
        self._buffers = [memoryview(bytearray(largest + largest // 8)) for _ in range(READ_THREADS)]
        self.ways: dict[str, Callable[[], Iterable[tuple[Path, int, int]]]] = {
            "file by file": self._whole_files,
            "layer by layer": self._layer_slices,
        }

    def seconds(self, way: str) -> float:
        """Time to read all files in one of `ways`; what the page cache had of them is dropped first."""
        pieces = list(self.ways[way]())
        drop_page_cache(self._files)
        start = time.perf_counter()
        parts = [pieces[number::READ_THREADS] for number in range(READ_THREADS)]
        list(self._threads.map(_read, parts, self._buffers))
        return time.perf_counter() - start

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    def _whole_files(self) -> Iterator[tuple[Path, int, int]]:
        return ((file, 0, size) for file, size in self._sizes())

    def _layer_slices(self) -> Iterator[tuple[Path, int, int]]:
        """In the order in which a step needs them, of files that are compressed about so."""
        sizes = self._sizes()
        for layer in range(self._num_layers):
            for file, size in sizes:
                start, end = (size * number // self._num_layers for number in (layer, layer + 1))
                yield file, start, end - start

    def _sizes(self) -> list[tuple[Path, int]]:
        return [(file, file.stat().st_size) for file in self._files]


def flush(files: Iterable[Path]) -> None:
    """Has what was written to the files reach the disk, without which the page cache keeps it."""
    for descriptor in _opened(files):
        os.fsync(descriptor)


def drop_page_cache(files: Iterable[Path]) -> None:
    """Has the system forget what it holds of flushed files; file systems in memory keep it nevertheless."""
    for descriptor in _opened(files):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _opened(files: Iterable[Path]) -> Iterator[int]:
    """Each file in turn, open for reading; those that are gone, with a page that was let go, are passed over."""
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def bytes_from_disk() -> int | None:
    """Bytes that this process has had fetched from disks since its start, past the page cache; None where the system
    does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["read_bytes"])
    except (OSError, KeyError, ValueError):
        return None


def _read(pieces: list[tuple[Path, int, int]], buffer: memoryview) -> None:
    """Reads `(file, offset, bytes)` one after the other."""
    for file, offset, size in pieces:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            count = os.preadv(descriptor, [buffer[:size]], offset)
        finally:
            os.close(descriptor)
        assert count == size, f"{file} gave {count} bytes of {size} at {offset}"
