"""Memory of the host: mapped on first touch, and pinned where a GPU copies from it."""

import math
import mmap
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from distkv.storage.errors import CapacityError
from distkv.storage.process_limits import usable_cores

PIN_CHUNK = 2**30  # bytes registered with the driver at a time
MAPPED = 2  # cudaHostRegisterMapped: kernels may read and write the memory themselves
TOUCH_BYTES = 2**26  # that a thread touches at a time
TOUCH_THREADS = 16  # at most; more wait for the system's locks
WIPE_ON_FORK = 18  # MADV_WIPEONFORK, which Python has no name for


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that the system maps on first touch; torch's own are written at once."""
    return torch.from_numpy(np.zeros(shape, dtype=np.dtype(f"i{dtype.itemsize}"))).view(dtype)


def as_integers(x: Tensor) -> np.ndarray:
    """The bits of a CPU tensor as a numpy view, of whichever dtype (numpy knows no bfloat16)."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()


class HostBuffer:
    """`data`: a tensor of host memory in one allocation, pinned on request so that a GPU copies at full speed.

    It is pinned in pieces of `piece_rows` rows; a copy that reaches over the end of one fails.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool):
        """Raises CapacityError when the system does not give so much."""
        size = math.prod(shape) * dtype.itemsize
        try:
            # begins at a page of the system, as registration with the driver wants it; mapped on first touch. Shared
            # memory would be file pages, which are mapped one by one and slow to pin
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError):
            raise CapacityError(f"the host has no {size} bytes of memory to give; lower host_kv_bytes") from None
        with suppress(OSError):  # an older kernel
            # a forked process sees zeros. It has no use for pages, and if it had them they would be copied on write:
            # a GPU would go on with those of before
            memory.madvise(WIPE_ON_FORK)
        self.data = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)
        self._registered: list[int] = []
        row = math.prod(shape[1:]) * dtype.itemsize
        unit = math.lcm(max(row, 1), mmap.PAGESIZE)  # no row in two pieces
        chunk = max(1, PIN_CHUNK // unit) * unit
        self.piece_rows = chunk // max(row, 1)
        if pinned and size:
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)  # a five-hundredth of the pages to map and to pin
            self._pin(size, chunk)

    def close(self) -> None:
        """Lets go of the memory."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered = []
        self.data = self.data[:0].clone()

    def _pin(self, size: int, chunk: int) -> None:
        """Registers the memory with the driver, which threads have mapped before: the driver would do so alone.

        torch's pinned allocator would round up to a power of two, and one registration of a huge range may be refused.
        """
        data = as_integers(self.data).reshape(-1).view(np.uint8)
        with ThreadPoolExecutor(min(TOUCH_THREADS, usable_cores()), "kv-touch") as threads:
            parts = [data[first : first + TOUCH_BYTES] for first in range(0, size, TOUCH_BYTES)]
            touched = [threads.submit(_touch, part) for part in parts]
            for first in range(0, size, chunk):
                end = min(first + chunk, size)
                wait(touched[first // TOUCH_BYTES : -(-end // TOUCH_BYTES)])
                if error := _register(self.data.data_ptr() + first, end - first):
                    threads.shutdown(cancel_futures=True)
                    self.close()
                    raise CapacityError(
                        f"{size} bytes of host memory cannot be pinned (CUDA error {error}); lower host_kv_bytes, or "
                        "raise the limit of locked memory (ulimit -l)"
                    )
                self._registered.append(self.data.data_ptr() + first)


def _touch(data: np.ndarray) -> None:
    """Has the system map memory, which is zeros; numpy lets other threads run meanwhile."""
    data[:: mmap.PAGESIZE] = 0


def _register(address: int, size: int) -> int:
    """Pins memory; returns CUDA's error, 0 for none."""
    error = int(torch.cuda.cudart().cudaHostRegister(address, size, MAPPED))
    if error:
        _forget_error()
    return error


def _forget_error() -> None:
    """The runtime keeps an error for whoever asks next. That would be the launch of a kernel that has done nothing
    wrong; so it is this one, after which it is gone."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
