"""Small copies between host and device that nobody waits for: parameters on their way up, tokens on their way down."""

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 2  # words: kernels read addresses that are multiples of 16 bytes
DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


def to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays of int64 or float64, by name, as tensors of the same shapes. On CUDA all of them take one copy from pinned
    memory, which is ordered by the current stream."""
    spans, size = lay_out({name: array.size for name, array in arrays.items()})
    packed = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
    pack(arrays, spans, packed)
    sent = packed.to(device, non_blocking=True)
    return {name: sent[spans[name]].view(DTYPES[array.dtype]).view(array.shape) for name, array in arrays.items()}


def lay_out(sizes: dict[str, int]) -> tuple[dict[str, slice], int]:
    """Places for so many words of 8 bytes each in one block, and the words of the block."""
    spans, size = {}, 0
    for name, count in sizes.items():
        spans[name] = slice(size, size + count)
        size += -(-count // ALIGNMENT) * ALIGNMENT
    return spans, size


def pack(arrays: dict[str, np.ndarray], spans: dict[str, slice], block: Tensor) -> None:
    """Copies each array to the start of its place in a block in CPU memory."""
    words = block.numpy()
    for name, array in arrays.items():
        first = spans[name].start
        words[first : first + array.size] = np.ascontiguousarray(array).reshape(-1).view(np.int64)


class HostCopy:
    """What a tensor holds by the current stream's time, on its way to the host; from a CPU it is there at once."""

    def __init__(self, source: Tensor):
        self._event: torch.cuda.Event | None = None
        self._host = source
        if source.is_cuda:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(source.device))

    def wait(self) -> np.ndarray:
        """The content. Any thread may wait, and more than once; what failed on the device before is raised here."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
