"""A device and the memory of the host beside it: what torch does one way on a CPU and another way on CUDA.

This is the one place that asks which of them it is. By which kernels a rank runs its steps is another question, see
`workers/backend.py`: several kinds of kernels may share a device.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distkv.storage.moving.link import Link
from distkv.storage.moving.page_copies import PageCopies
from distkv.storage.moving.streams import CudaStreams, Event
from distkv.storage.paging import CPU_BUFFERS, NUM_BUFFERS
from distkv.storage.pools.host_memory import as_integers, lazy_zeros
from distkv.storage.process_limits import available_bytes


@dataclass(frozen=True)
class HostCopy:
    """What a tensor held when `Device.bring` was called, on its way to the host."""

    host: Tensor
    arrival: Event | None  # None where it is there at once

    def wait(self) -> np.ndarray:
        """The content. Any thread may wait, and more than once; what failed on the device before is raised here."""
        return self.tensor().numpy()

    def tensor(self) -> Tensor:
        """The same as a tensor, of whichever dtype."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.host


class Device(Protocol):
    """Where the tensors of a rank lie. For small tensors two of the same `torch_device` are the same: there is no other
    state but a simulated link."""

    torch_device: torch.device
    runs_behind: bool  # whether what is enqueued may run after the call has returned

    # --- memory for pages, and how they cross ---

    pinned: bool  # whether host memory that pages cross from is registered with the driver, for full speed
    num_buffers: int  # of a staging ring, see `paging.py`
    link: Link | None  # whose time is waited for where pages cross; None where copies take their own

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for pages. Raises MemoryError or torch.OutOfMemoryError."""
        ...

    def free_bytes(self) -> int:
        """Memory that can be taken."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies a page between host memory and the device, on the thread that calls."""

    def make_copies(self) -> PageCopies | None:
        """Lanes on which pages cross beside what computes; None where the host copies them by itself."""

    # --- small tensors ---

    def host_block(self, size: int) -> Tensor:
        """Host memory of `size` words, int64, from which a copy that nobody waits for may start."""
        ...

    def bring(self, x: Tensor) -> HostCopy:
        """Starts a copy to the host, behind what the current stream has been given so far."""
        ...

    def running_sums(self, x: Tensor) -> Tensor:
        """The sums along each row `[rows, n]` of numbers that are not below 0. They never fall, and those of a row do
        not depend on the other rows."""
        ...

    # --- threads ---

    def enter_thread(self) -> None:
        """Has the calling thread use this device from now on, with all that other threads gave it done."""


class CpuDevice:
    """A `Device` whose memory is the host's."""

    torch_device = torch.device("cpu")
    runs_behind = False
    pinned = False
    num_buffers = CPU_BUFFERS
    link: Link | None = None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return lazy_zeros(shape, dtype)

    def free_bytes(self) -> int:
        return available_bytes()

    def copy(self, source: Tensor, target: Tensor) -> None:
        # numpy's copy leaves torch's thread team alone, so that it can run beside a step
        as_integers(target)[...] = as_integers(source)

    def make_copies(self) -> None:
        return None

    def host_block(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64)

    def bring(self, x: Tensor) -> HostCopy:
        return HostCopy(x, None)

    def running_sums(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)

    def enter_thread(self) -> None:
        pass


class SimulatedDevice(CpuDevice):
    """A `Device` of host memory that stands for a device's, behind a link of its own."""

    num_buffers = NUM_BUFFERS

    def __init__(self, link: Link):
        self.link = link


class CudaDevice:
    """A `Device` on CUDA."""

    runs_behind = True
    pinned = True
    num_buffers = NUM_BUFFERS
    link: Link | None = None

    def __init__(self, torch_device: torch.device):
        self.torch_device = torch_device

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def make_copies(self) -> PageCopies:
        return PageCopies(CudaStreams(self.torch_device))

    def host_block(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, pin_memory=True)

    def bring(self, x: Tensor) -> HostCopy:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(x.device))
        return HostCopy(host, event)

    def running_sums(self, x: Tensor) -> Tensor:
        # rounding might make them fall; and a single row takes another algorithm than several, which may round
        # otherwise
        rows = x if len(x) > 1 else x.expand(2, -1)
        return rows.cumsum(-1).cummax(-1).values[: len(x)]

    def enter_thread(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.set_device(self.torch_device)  # the current one is a matter of the thread


@cache
def device_of(torch_device: torch.device) -> Device:
    """The device of tensors that say so, such as `x.device`."""
    return CudaDevice(torch_device) if torch_device.type == "cuda" else CpuDevice()
