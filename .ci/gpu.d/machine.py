"""What the machine is: memory, pinning, the link, launches. `machine.py FILE` writes the answers there."""

import mmap
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from probing import Probes, gigabytes, host_seconds, seconds

from distkv.storage.moving.row_copies import copy_rows
from distkv.storage.pools.host_memory import HostBuffer, _forget_error

GIB = 2**30
PINNED = 2  # GiB in each way
MAPPED = 2  # cudaHostRegisterMapped


def facts() -> dict[str, Any]:
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    answers: dict[str, Any] = {}
    for name in ("MemTotal", "MemAvailable", "Shmem", "CommitLimit"):
        answers[name] = memory[name].strip()
    for name, command in {
        "gpu": "nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,pcie.link.gen.current,"
        "pcie.link.width.current,memory.total --format=csv,noheader",
        "processor": "lscpu | grep -iE 'model name|numa node.s'",
        "locked memory": "ulimit -l",
        "huge pages": "cat /sys/kernel/mm/transparent_hugepage/enabled",
        "huge pages of shared memory": "cat /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "overcommit": "cat /proc/sys/vm/overcommit_memory",
        "control group": "cat /sys/fs/cgroup/memory.max",
    }.items():
        answers[name] = subprocess.getoutput(command)[:200]
    answers |= {"cores": os.cpu_count(), "python": sys.version.split()[0], "torch": torch.__version__}
    answers |= {"cuda": torch.version.cuda, "triton": triton.__version__, "numpy": np.__version__}
    return answers


def peaks() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.ones(GIB // 4, device="cuda")
    target = torch.empty_like(source)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "L2 MiB": properties.L2_cache_size / 2**20,
        "free and total": torch.cuda.mem_get_info(),
        "bf16 TFLOP/s": round(2 * 8192**3 / seconds(lambda: a @ b) / 1e12),
        "copy GB/s, both ways counted": gigabytes(2 * GIB, seconds(lambda: target.copy_(source))),
        "read GB/s": gigabytes(GIB, seconds(source.sum)),
    }


def refused_pinning() -> dict[str, Any]:
    """Whether an error of the runtime stays for the next launch, and whether `_forget_error` takes it away."""
    memory = torch.empty(2**20, dtype=torch.uint8)
    runtime, address = torch.cuda.cudart(), memory.data_ptr()

    def refuse() -> list[int]:
        return [int(runtime.cudaHostRegister(address, 2**20, MAPPED)) for _ in range(2)]

    def next_launch() -> str:
        try:
            torch.ones(4, device="cuda").add_(1)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return "nothing"

    answers: dict[str, Any] = {"codes": refuse(), "raised by the next launch": next_launch(), "then": next_launch()}
    refuse()
    _forget_error()
    answers["after _forget_error"] = next_launch()
    runtime.cudaHostUnregister(address)
    return answers


def pinning() -> dict[str, Any]:
    """Seconds for each GiB to touch and to register, and the link; of shared memory, private, private in huge pages,
    private in huge pages that threads have touched; and what `HostBuffer` takes."""
    answers: dict[str, Any] = {}
    device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    for name, flags, huge, touched in (
        ("shared", mmap.MAP_SHARED, False, False),
        ("private", mmap.MAP_PRIVATE, False, False),
        ("private, huge", mmap.MAP_PRIVATE, True, False),
        ("private, huge, touched", mmap.MAP_PRIVATE, True, True),
    ):
        memory = mmap.mmap(-1, PINNED * GIB, flags=flags | mmap.MAP_ANONYMOUS)
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        host = torch.frombuffer(memory, dtype=torch.uint8)
        start = time.perf_counter()
        if touched:
            parts = np.split(host.numpy(), PINNED * 16)
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(_touch, parts))
            del parts
        middle = time.perf_counter()
        pieces = [host.data_ptr() + n * GIB for n in range(PINNED)]
        codes = [int(torch.cuda.cudart().cudaHostRegister(piece, GIB, MAPPED)) for piece in pieces]
        end = time.perf_counter()
        answers[name] = {
            "touch s/GiB": round((middle - start) / PINNED, 3),
            "register s/GiB": round((end - middle) / PINNED, 3),
            "codes": codes,
            **_link(host[:GIB], device),
        }
        start = time.perf_counter()
        for piece in pieces:
            torch.cuda.cudart().cudaHostUnregister(piece)
        answers[name]["unregister s/GiB"] = round((time.perf_counter() - start) / PINNED, 3)
        del host
    start = time.perf_counter()
    with closing(HostBuffer((4, GIB), torch.uint8, pinned=True)) as buffer:
        answers["HostBuffer of 4 GiB"] = {"s/GiB": round((time.perf_counter() - start) / 4, 3)}
        answers["HostBuffer of 4 GiB"] |= _link(buffer.data[0], device)
    return answers


def _touch(part: np.ndarray) -> None:
    part[::4096] = 0


def _link(host: torch.Tensor, device: torch.Tensor) -> dict[str, Any]:
    return {
        "pinned": host.is_pinned(),
        "in GB/s": gigabytes(GIB, seconds(lambda: device.copy_(host, non_blocking=True), 5)),
        "out GB/s": gigabytes(GIB, seconds(lambda: host.copy_(device, non_blocking=True), 5)),
    }


def copies_of_rows() -> dict[str, Any]:
    """Layer slices of neighbouring pages, by one call for all and by one for each; us are what it costs the host."""
    answers: dict[str, Any] = {}
    for size, count in ((2**17, 64), (2**20, 32)):
        with closing(HostBuffer((count, 4, size), torch.uint8, pinned=True)) as buffer:
            source, target = buffer.data[:, 1], torch.zeros(count, size, dtype=torch.uint8, device="cuda")
            source.random_(256)
            for name, runs in (
                ("in one call", [(0, 0, count)]),
                ("in a call each", [(row, row, 1) for row in range(count)]),
            ):

                def into(runs: Any = runs, source: Any = source, target: Any = target) -> None:
                    copy_rows(source, target, runs)

                def back(runs: Any = runs, source: Any = source, target: Any = target) -> None:
                    copy_rows(target, source, runs)

                target.zero_()
                into()
                answers[f"{count} rows of {size} bytes {name}"] = {
                    "right": torch.equal(target.cpu(), source),
                    "in GB/s": gigabytes(count * size, seconds(into)),
                    "out GB/s": gigabytes(count * size, seconds(back)),
                    "host us": round(1e6 * host_seconds(into, 50), 1),
                }
    return answers


@triton.jit
def _nothing(x, n):
    pass


def launches() -> dict[str, Any]:
    """Microseconds: of the host for a launch, of the device for a kernel of a graph, of the host for a replay."""
    x = torch.zeros(16, device="cuda")
    graph, count = torch.cuda.CUDAGraph(), 320
    _nothing[(1,)](x, 3)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(count):
            _nothing[(1,)](x, 3)
    return {
        "triton, host": round(1e6 * host_seconds(lambda: _nothing[(1,)](x, 3)), 2),
        "torch, host": round(1e6 * host_seconds(lambda: x.add_(1)), 2),
        f"graph of {count}, each": round(1e6 * seconds(graph.replay) / count, 3),
        f"graph of {count}, host": round(1e6 * host_seconds(graph.replay, 50), 1),
        "event, host": round(1e6 * host_seconds(lambda: torch.cuda.Event(blocking=True).record()), 2),
    }


probes = Probes(Path(sys.argv[1]))
for probe in (facts, peaks, refused_pinning, pinning, copies_of_rows, launches):
    probes.ask(probe)
probes.end()
