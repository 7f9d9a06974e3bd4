"""Which tiles, stages, programs and splits attention over resident pages likes best on this GPU. `sweep.py FILE`.

All variants are compiled first, by several processes. Each figure is a median by events of the device; the keys and
values of a row are several times what the cache holds. A variant whose result is not that of the first one is a
failure, not a figure.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from probing import Probes, gigabytes, seconds
from torch import Tensor

from distkv.bench.kernel_attention import compare, random_pool
from distkv.bench.kernel_work import AttentionShape
from distkv.kernels.cuda import decode, prefill
from distkv.storage.device import device_of
from distkv.storage.paging import pages_for
from distkv.workers.attention import decode_plan
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send

SHAPE = AttentionShape()
DECODES = ((1, 131072), (8, 32768), (32, 8192))  # batch and context
PROMPTS = (8192, 32768)
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Variant:
    """How a kernel is launched instead."""

    split: int = decode_plan.DECODE_SPLIT  # tokens of a split
    programs: int = 3  # of decode for each multiprocessor
    options: dict[str, int] = field(default_factory=dict)  # of the launch

    @property
    def name(self) -> str:
        said = [f"{name} {value}" for name, value in self.options.items()]
        return ", ".join([f"split {self.split}", f"{self.programs} programs", *said])


DECODE_VARIANTS = [
    Variant(split, programs, {"BLOCK_N": keys, "num_warps": warps, "num_stages": stages})
    for split, programs, keys, warps, stages in (
        (256, 3, 64, 4, 3),  # as it is
        (256, 2, 64, 4, 3), (256, 4, 64, 4, 3), (256, 6, 64, 4, 2), (256, 3, 64, 4, 4), (256, 2, 64, 4, 5),
        (256, 3, 64, 8, 3), (256, 4, 32, 4, 4), (256, 6, 32, 2, 4), (256, 4, 32, 2, 6), (256, 2, 128, 4, 3),
        (256, 2, 128, 8, 3), (512, 3, 64, 4, 3), (1024, 3, 64, 4, 3), (1024, 2, 64, 4, 5), (1024, 4, 32, 4, 4),
        (1024, 2, 128, 8, 3), (2048, 3, 64, 4, 3),
    )
]  # fmt: skip
PREFILL_VARIANTS = [
    Variant(options={"BLOCK_N": keys, "num_warps": warps, "num_stages": stages})
    for keys, warps, stages in ((64, 8, 3), (64, 8, 2), (64, 8, 4), (128, 8, 2), (128, 8, 3), (64, 4, 3), (32, 8, 4))
]


class Launcher:
    """A kernel of which each launch has some options instead of those that it is given."""

    def __init__(self, kernel: Any, options: dict[str, int]):
        self._kernel, self._options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **options: self._kernel[grid](*arguments, **{**options, **self._options})


@contextmanager
def launched_as(variant: Variant) -> Iterator[None]:
    with (
        mock.patch.object(decode_plan, "DECODE_SPLIT", variant.split),
        mock.patch.object(decode, "_decode_kernel", Launcher(decode._decode_kernel, variant.options)),
        mock.patch.object(prefill, "_prefill_kernel", Launcher(prefill._prefill_kernel, variant.options)),
    ):
        yield


def attention(steps: list[SequenceStep], variant: Variant) -> CudaAttention:
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    programs = max(1, variant.programs * processors // SHAPE.kv_heads)
    shape = CudaShape(SHAPE.query_heads, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.page_size, 0, SHAPE.dtype, programs)
    plan = plan_cuda_attention(steps, shape)
    return CudaAttention(plan, shape, send(plan.arrays, device_of(CUDA)))


def decode_steps(batch: int, context: int, table: Tensor) -> list[SequenceStep]:
    pages = table.view(batch, -1).cpu().numpy()
    return [SequenceStep([0], context - 1, mine, context, 1) for mine in pages]


def prefill_steps(tokens: int, table: Tensor) -> list[SequenceStep]:
    return [SequenceStep([0] * tokens, 0, table.cpu().numpy(), tokens, 1)]


def tried(steps: list[SequenceStep], rows: int, pool: Tensor, variants: list[Variant], repeats: int) -> dict[str, Any]:
    """Seconds of each variant, or what it failed with."""
    q = torch.randn(rows, SHAPE.query_heads, SHAPE.head_dim, device=CUDA).to(SHAPE.dtype)
    first, found = None, {}
    for variant in variants:
        try:
            with launched_as(variant):
                planned = attention(steps, variant)
                out = planned.attend(q, q, q, pool, None)
                first = out if first is None else first
                compare(variant.name, out, first)
                found[variant.name] = seconds(lambda planned=planned: planned.attend(q, q, q, pool, None), repeats, 1)
        except Exception as error:  # more shared memory than there is, say
            found[variant.name] = f"{type(error).__name__}: {error}"[:150]
    return found


def decode_sweep() -> dict[str, Any]:
    """GB/s of keys and values."""
    answers = {}
    for batch, context in DECODES:
        pool, table = random_pool(SHAPE, batch * pages_for(context, SHAPE.page_size), CUDA)
        found = tried(decode_steps(batch, context, table), batch, pool, DECODE_VARIANTS, 9)
        size = SHAPE.kv_bytes(batch * context)
        answers[f"{batch} x {context}"] = {
            name: taken if isinstance(taken, str) else gigabytes(size, taken) for name, taken in found.items()
        }
        del pool
    return answers


def prefill_sweep() -> dict[str, Any]:
    """TFLOP/s."""
    answers = {}
    for tokens in PROMPTS:
        pool, table = random_pool(SHAPE, pages_for(tokens, SHAPE.page_size), CUDA)
        found = tried(prefill_steps(tokens, table), tokens, pool, PREFILL_VARIANTS, 5)
        work = SHAPE.prefill_flops(tokens)
        answers[f"{tokens} tokens"] = {
            name: taken if isinstance(taken, str) else round(work / taken / 1e12, 1) for name, taken in found.items()
        }
    return answers


def compile_share(number: int, count: int) -> None:
    """Runs every `count`-th variant once, on little: Triton keeps in its cache what that compiles."""
    pool, table = random_pool(SHAPE, 16, CUDA)
    work = [*product((decode_steps(1, 2048, table[:8]),), (1,), DECODE_VARIANTS)]
    work += [*product((prefill_steps(2048, table[:8]),), (2048,), PREFILL_VARIANTS)]
    for steps, rows, variant in work[number::count]:
        tried(steps, rows, pool, [variant], 1)


def main() -> None:
    if sys.argv[1] == "compile":
        compile_share(int(sys.argv[2]), int(sys.argv[3]))
        return
    count = min(8, os.cpu_count() or 1)
    command = [sys.executable, __file__, "compile"]
    compilers = [subprocess.Popen([*command, str(number), str(count)]) for number in range(count)]
    for compiler in compilers:
        compiler.wait()
    probes = Probes(Path(sys.argv[1]))
    for probe in (decode_sweep, prefill_sweep):
        probes.ask(probe)
    probes.end()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
