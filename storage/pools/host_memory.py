"""Memory of the host: mapped on first touch, and pinned where a GPU copies from it."""

import math
import mmap

import numpy as np
import torch
from torch import Tensor

from distkv.storage.errors import CapacityError

PIN_CHUNK = 2**30  # bytes registered with the driver at a time
MAPPED = 2  # cudaHostRegisterMapped: kernels may read and write the memory themselves


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that the system maps on first touch; torch's own are written at once."""
    return torch.from_numpy(np.zeros(shape, dtype=np.dtype(f"i{dtype.itemsize}"))).view(dtype)


def as_integers(x: Tensor) -> np.ndarray:
    """The bits of a CPU tensor as a numpy view, of whichever dtype (numpy knows no bfloat16)."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()


class HostBuffer:
    """`data`: a tensor of host memory in one allocation, pinned on request so that a GPU copies at full speed."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool):
        """Raises CapacityError when the system does not give so much."""
        size = math.prod(shape) * dtype.itemsize
        try:
            # begins at a page of the system, as registration with the driver wants it; mapped on first touch
            memory = mmap.mmap(-1, max(size, 1))
        except (OSError, OverflowError):
            raise CapacityError(f"the host has no {size} bytes of memory to give; lower host_kv_bytes") from None
        self.data = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)
        self._registered: list[int] = []
        if pinned and size:
            self._pin(size, math.prod(shape[1:]) * dtype.itemsize)

    def close(self) -> None:
        """Lets go of the memory."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered = []
        self.data = self.data[:0].clone()

    def _pin(self, size: int, row: int) -> None:
        # torch's pinned allocator would round up to a power of two, and one registration of a huge range may be
        # refused; a row of `row` bytes must not lie in two, since a copy out of both fails
        unit = math.lcm(row, mmap.PAGESIZE)
        chunk = max(1, PIN_CHUNK // unit) * unit
        start = self.data.data_ptr()
        for first in range(0, size, chunk):
            error = torch.cuda.cudart().cudaHostRegister(start + first, min(chunk, size - first), MAPPED)
            if error.value:
                self.close()
                raise CapacityError(
                    f"{size} bytes of host memory cannot be pinned (CUDA error {error.value}); lower host_kv_bytes, or "
                    "raise the limit of locked memory (ulimit -l)"
                )
            self._registered.append(start + first)
