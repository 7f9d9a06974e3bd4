"""How fast this CPU reads weights, multiplies and copies: what a plan divides bytes and operations by."""

from dataclasses import dataclass

import torch

from distkv.workers.backend import make_backend
from distkv.workers.bandwidth import fastest, seconds_of
from distkv.workers.threads import release_threads

WEIGHT = 4096, 8192  # outputs and inputs in bfloat16: 64 MiB, more than a processor's cache
PRODUCT = 2048, 2048
ROWS = 128  # of the product that counts operations
COPY_BYTES = 2**26


@dataclass(frozen=True)
class CpuRates:
    """Of all threads that torch computes with in this process."""

    read: float  # bytes of weights per second, by the product of one row
    matrix: float  # multiplications and additions per second, by the product of many rows
    copy: float  # bytes per second from one place in memory to another


def measure_cpu() -> CpuRates:
    """Takes about half a second, by the kernels that engines use here. The fastest of several counts, since others may
    use the machine."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    rates = CpuRates(
        read=2 * WEIGHT[0] * WEIGHT[1] / _product_seconds(1, *WEIGHT),
        matrix=2 * ROWS * PRODUCT[0] * PRODUCT[1] / _product_seconds(ROWS, *PRODUCT),
        copy=COPY_BYTES / fastest(lambda: seconds_of(lambda: target.copy_(source))),
    )
    release_threads()  # who called goes on to compute nothing
    return rates


@torch.inference_mode()
def _product_seconds(rows: int, outputs: int, inputs: int) -> float:
    linear = make_backend("cpu").kernels.make_linear(torch.full((outputs, inputs), 0.01, dtype=torch.bfloat16))
    x = torch.full((rows, inputs), 0.01, dtype=torch.bfloat16)
    return fastest(lambda: seconds_of(lambda: linear(x)))
