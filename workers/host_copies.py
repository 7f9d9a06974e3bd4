"""Small copies between host and device that nobody waits for: parameters on their way up, draws on their way down."""

import numpy as np
import torch
from torch import Tensor

DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


def to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays of int64 or float64, by name, as tensors of the same shapes. On CUDA all of them take one copy from pinned
    memory, which is ordered by the current stream."""
    if not arrays:
        return {}
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.int64) for array in arrays.values()]
    sizes = [len(one) for one in flat]
    packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(flat, out=packed.numpy())
    parts = packed.to(device, non_blocking=True).split(sizes)
    return {
        name: part.view(DTYPES[array.dtype]).view(array.shape)
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


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
