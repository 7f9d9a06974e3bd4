"""The CUDA device that is measured: time by its own events, bytes, and what it can do at most."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from distkv.bench.harness import Bench, Figure
from distkv.errors import ConfigError
from distkv.reporting.machine import cpu_name
from distkv.storage.device import device_of
from distkv.storage.pools.host_memory import HostBuffer

FLUSH_BYTES = 2**30  # many times any L2, and reading it takes longer than the launches that wait behind it
COPY_BYTES = 2**30
MATMUL_SIZE = 8192
WARM_UP = 2

Work = Callable[[], object]
"""Puts work on the current stream."""


def require_cuda(command: str) -> None:
    """Raises ConfigError where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"distkv bench {command} measures a CUDA device and torch sees none; run it on a machine with an NVIDIA "
            "GPU and a CUDA build of torch"
        )


def check_parts(only: list[str], parts: tuple[str, ...]) -> list[str]:
    """The parts that were asked for, in their order, or all; raises ConfigError for one that there is not."""
    for name in only:
        if name not in parts:
            raise ConfigError(f"there is no part {name!r}; use {', '.join(parts)}")
    return [name for name in parts if not only or name in only]


def device_facts() -> dict[str, Any]:
    """What a kernel depends on beside `machine_facts`, whose machine is the GPU here."""
    return {
        "processor": cpu_name(),
        "device_bytes": torch.cuda.mem_get_info()[1],
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }


class DeviceMeter:
    """What is read off the CUDA device: seconds by its own events, with nothing in the cache beforehand, and bytes."""

    def __init__(self) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 4, device="cuda")
        self.processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        self._streams = [torch.cuda.Stream() for _ in range(2)]

    def seconds(self, work: Work) -> float:
        """The seconds that work on the current stream takes. The launches are queued while the cache is
        flushed, so they are not in it."""
        self._prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def seconds_each(self, works: tuple[Work, Work]) -> tuple[float, float]:
        """The seconds of two works that begin at once, each on a stream of its own."""
        self._prepare()
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        ends = []
        for stream, work in zip(self._streams, works, strict=True):
            with torch.cuda.stream(stream):
                stream.wait_event(start)
                work()
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
        torch.cuda.synchronize()
        first, second = (start.elapsed_time(end) / 1e3 for end in ends)
        return first, second

    def forget_peak(self) -> None:
        """Has `peak_bytes` begin anew."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most bytes that tensors took at a time since `forget_peak`."""
        return torch.cuda.max_memory_allocated()

    def free_bytes(self) -> int:
        """That tensors may still take."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def _prepare(self) -> None:
        """Pushes out of the cache what is there. By reading: what is written would have to go to memory while the work
        runs."""
        torch.cuda.synchronize()
        self._flush.sum()


@dataclass(frozen=True)
class Turns:
    """The turns of a benchmark on a device."""

    meter: DeviceMeter
    device: torch.device
    bench: Bench

    def seconds(self, works: Mapping[str, Work]) -> dict[str, Figure]:
        """Seconds of the device's clock, of works that alternate."""
        timed = {name: partial(self.meter.seconds, work) for name, work in works.items()}
        return {name: Figure.of(times) for name, times in self.bench.in_turns(timed, warm_up=WARM_UP).items()}

    def seconds_each(self, works: tuple[Work, Work]) -> tuple[Figure, Figure]:
        """The same of two works that always begin at once."""
        taken = self.bench.in_turns({"both at once": partial(self.meter.seconds_each, works)}, warm_up=WARM_UP)
        first, second = (Figure.of(times) for times in zip(*taken["both at once"], strict=True))
        return first, second


class MemoryCeiling:
    """Passes over device memory that is many times as large as the cache."""

    def __init__(self, device: torch.device, num_bytes: int = COPY_BYTES):
        self.read_bytes = num_bytes
        self.copy_bytes = 2 * num_bytes
        self._source = torch.ones(num_bytes // 4, device=device)
        self._target = torch.zeros_like(self._source)

    def copy(self) -> Tensor:
        """Moves `copy_bytes`: it reads one half and writes the other."""
        return self._target.copy_(self._source)

    def read(self) -> Tensor:
        """Moves `read_bytes`, of which nothing is written."""
        return self._source.sum()


class MatmulCeiling:
    """A product of two square matrices."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int = MATMUL_SIZE):
        self.name = f"{str(dtype).removeprefix('torch.')} {size}^3"
        self.flops = 2 * size**3
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def run(self) -> Tensor:
        return torch.mm(self._a, self._b, out=self._out)


class LinkCeiling:
    """Copies between pinned host memory and the device, each way with buffers of its own."""

    def __init__(self, device: torch.device, num_bytes: int = COPY_BYTES):
        """Raises CapacityError when the host has no such memory to pin."""
        self.num_bytes = num_bytes
        self._host = HostBuffer((2, num_bytes), torch.uint8, pinned=device_of(device).pinned)
        self._host.data.fill_(1)
        self._device = torch.ones(2, num_bytes, dtype=torch.uint8, device=device)

    def to_device(self) -> Tensor:
        """Brings `num_bytes`."""
        return self._device[0].copy_(self._host.data[0], non_blocking=True)

    def to_host(self) -> Tensor:
        """Takes `num_bytes` back."""
        return self._host.data[1].copy_(self._device[1], non_blocking=True)

    def close(self) -> None:
        """Frees the buffers."""
        self._host.close()
        self._device = self._device[:0].clone()
