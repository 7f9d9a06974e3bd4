"""GPUs, their driver, and pinned memory."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from distkv.doctor.finding import Finding, fine, problem, warning
from distkv.planner.units import shown_bytes
from distkv.storage.pools.host_memory import HostBuffer

DRIVER = Path("/dev/nvidiactl")  # the driver's, where there is one
LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores, and what the kernels are compiled for
PINNED_BYTES = 2**28  # of the trial
LEAST_FREE = 0.9  # share of a GPU's memory


def check_gpus() -> Iterator[Finding]:
    """Each GPU, and whether memory can be pinned for it."""
    if not torch.cuda.is_available():
        yield _without_gpu()
        return
    for index in range(torch.cuda.device_count()):
        yield from _check_gpu(index)
    yield _check_pinning()


def _without_gpu() -> Finding:
    if not DRIVER.exists():
        return fine("GPU", "none, so ranks run on the CPU")
    if torch.version.cuda is None:
        return problem(
            "GPU", f"there is one, and torch {torch.__version__} is built for CPUs", "install a build for CUDA"
        )
    return problem(
        "GPU", f"there is one, and torch, which is built for CUDA {torch.version.cuda}, cannot use it",
        "look at nvidia-smi and update the driver, or unset CUDA_VISIBLE_DEVICES",
    )  # fmt: skip


def _check_gpu(index: int) -> Iterator[Finding]:
    name, what = torch.cuda.get_device_name(index), f"GPU {index}"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        yield problem(
            what, f"{name} has compute capability {'.'.join(map(str, capability))}",
            f"use one with {'.'.join(map(str, LEAST_CAPABILITY))} or newer (A10, A100, L4, H100, RTX 30 and up)",
        )  # fmt: skip
        return
    free, total = torch.cuda.mem_get_info(index)
    said = f"{name}, {shown_bytes(free)} of {shown_bytes(total)} are free"
    if free < LEAST_FREE * total:
        yield warning(what, said, "end what holds the rest (nvidia-smi names it), or lower gpu_memory_utilization")
    else:
        yield fine(what, said)


def _check_pinning() -> Finding:
    start = time.perf_counter()
    try:
        memory = HostBuffer((PINNED_BYTES,), torch.uint8, pinned=True)
    except Exception as error:
        return problem(
            "pinned memory", f"{shown_bytes(PINNED_BYTES)} cannot be pinned: {error}",
            "raise the limits of the container (ulimit -l unlimited); without it no page leaves the GPU",
        )  # fmt: skip
    seconds = time.perf_counter() - start
    memory.close()
    return fine("pinned memory", f"{shown_bytes(PINNED_BYTES / seconds)} are pinned in a second")
