"""Which tiles, stages, programs and splits attention over resident pages likes best on this GPU. `sweep.py FILE`.

All variants are compiled first, by several processes. Each figure is a median by events of the device, with nothing in
its cache beforehand. A variant whose result is not that of the first one is a failure, not a figure.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from decode_parts import merge_alone, read_pages, splits_alone
from probing import Probes, gigabytes
from torch import Tensor

from distkv.bench.device import DeviceMeter, Work
from distkv.bench.kernel_attention import compare, random_pool
from distkv.bench.kernel_work import AttentionShape
from distkv.kernels.cuda import decode, prefill
from distkv.storage.device import device_of
from distkv.storage.paging import pages_for
from distkv.workers.attention import cuda, decode_plan
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send

SHAPE = AttentionShape()
DECODES = ((8, 8192), (1, 131072), (8, 32768), (32, 8192), (8, 131072))  # batch and context
PROMPTS = (8192, 32768)
COMPILED_TOKENS = 2048  # of the launches that only compile
COMPILE_SECONDS = 60  # what is not compiled by then is compiled where it is measured
READERS = (3, 6, 12, 10000)  # programs for each multiprocessor that only read pages; it takes 3 at a time
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Variant:
    """How a kernel is launched instead."""

    split: int = decode_plan.DECODE_SPLIT  # tokens of a split
    programs: int = 3  # of decode for each multiprocessor; no more than there are splits
    options: dict[str, int] = field(default_factory=dict)  # of the launch

    @property
    def name(self) -> str:
        said = [f"{name} {value}" for name, value in self.options.items()]
        return ", ".join([f"split {self.split}", f"{self.programs} programs", *said])


def tile(keys: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


# As compiled for an H100, an SM takes at a time, of programs with tiles of 64 keys: 3 with 3 stages, 4 with 2, 2 with
# 4, 1 with 5, and 2 with 8 warps; with tiles of 32 keys 5 with 3 stages and 4 with 4; with tiles of 128 keys and 2
# stages 2. Other numbers of programs end in a wave that is not full.
DECODE_VARIANTS = [
    *(
        Variant(split, programs, tile(keys, warps, stages))
        for split, programs, keys, warps, stages in (
            (256, 3, 64, 4, 3),  # as it is
            (256, 6, 64, 4, 3), (256, 12, 64, 4, 3), (256, 24, 64, 4, 3), (256, 10000, 64, 4, 3), (256, 2, 64, 4, 4),
            (256, 4, 64, 4, 2), (256, 4, 32, 4, 3), (256, 5, 32, 4, 3), (256, 4, 32, 4, 4), (256, 8, 32, 4, 4),
            (256, 12, 32, 4, 4), (256, 2, 64, 8, 3), (256, 2, 128, 8, 2), (256, 4, 128, 8, 2), (256, 1, 64, 4, 5),
            (512, 3, 64, 4, 3), (512, 6, 64, 4, 3), (1024, 3, 64, 4, 3), (1024, 12, 64, 4, 3),
        )
    ),
    Variant(256, 5, tile(64, 4, 2) | {"maxnreg": 96}),
]  # fmt: skip
PREFILL_VARIANTS = [
    Variant(options=tile(keys, warps, stages))
    for keys, warps, stages in ((64, 8, 3), (64, 8, 2), (64, 8, 4), (128, 8, 2), (32, 8, 4))
]


class Launcher:
    """A kernel of which each launch has some options instead of those that it is given."""

    def __init__(self, kernel: Any, options: dict[str, int]):
        self.compiled: Any = None  # what was launched last
        self._kernel, self._options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.compiled = self._kernel[grid](*arguments, **{**options, **self._options})

        return launch

    @property
    def resources(self) -> dict[str, int]:
        """Registers of a thread, what of it spills, bytes of shared memory of a program; nothing where nothing was
        launched, or Triton does not say."""
        sources = {"registers": (self.compiled, "n_regs"), "spills": (self.compiled, "n_spills")}
        sources["shared"] = getattr(self.compiled, "metadata", None), "shared"
        return {name: getattr(*source) for name, source in sources.items() if hasattr(*source)}


@contextmanager
def launched_as(variant: Variant) -> Iterator[tuple[Launcher, Launcher]]:
    """Has decode and prefill launch so; gives their launchers, in this order."""
    splits = Launcher(decode._decode_kernel, variant.options)
    walk = Launcher(prefill._prefill_kernel, variant.options)
    with (
        mock.patch.object(decode_plan, "DECODE_SPLIT", variant.split),
        mock.patch.object(decode, "_decode_kernel", splits),
        mock.patch.object(prefill, "_prefill_kernel", walk),
    ):
        yield splits, walk


def programs(count: int, most: int) -> int:
    """For each KV head, of `count` for each multiprocessor."""
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    return min(most, max(1, count * processors // SHAPE.kv_heads))


def attention(steps: list[SequenceStep], variant: Variant) -> CudaAttention:
    most = programs(variant.programs, 2**30)
    shape = CudaShape(SHAPE.query_heads, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.page_size, 0, SHAPE.dtype, most)
    plan = plan_cuda_attention(steps, shape)
    return CudaAttention(plan, shape, send(plan.arrays, device_of(CUDA)))


def decode_steps(batch: int, context: int, table: Tensor) -> list[SequenceStep]:
    pages = table.view(batch, -1).cpu().numpy()
    return [SequenceStep([0], context - 1, mine, context, 1) for mine in pages]


def prefill_steps(tokens: int, table: Tensor) -> list[SequenceStep]:
    return [SequenceStep([0] * tokens, 0, table.cpu().numpy(), tokens, 1)]


def queries(rows: int) -> Tensor:
    return torch.randn(rows, SHAPE.query_heads, SHAPE.head_dim, device=CUDA).to(SHAPE.dtype)


def median(meter: DeviceMeter, work: Work, repeats: int) -> float:
    """Seconds, after a turn to warm up."""
    return statistics.median([meter.seconds(work) for _ in range(1 + repeats)][1:])


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:150]


def tried(
    steps: list[SequenceStep], rows: int, pool: Tensor, variants: list[Variant], repeats: int, meter: DeviceMeter,
    rate: Callable[[float], float], unit: str,
) -> dict[str, Any]:  # fmt: skip
    """The rate of each variant and what it takes of an SM, or what it failed with."""
    q = queries(rows)
    first, found = None, dict[str, Any]()
    for variant in variants:
        try:
            with launched_as(variant) as (splits, walk):
                planned = attention(steps, variant)
                out = planned.attend(q, q, q, pool, None)
                first = out if first is None else first
                compare(variant.name, out, first)
                taken = median(meter, partial(planned.attend, q, q, q, pool, None), repeats)
            figures = {unit: rate(taken), "us": round(1e6 * taken, 1)}
            found[variant.name] = figures | splits.resources | walk.resources
        except Exception as error:  # more shared memory than there is, say
            found[variant.name] = failure(error)
    return found


def decode_row(meter: DeviceMeter, batch: int, context: int) -> dict[str, Any]:
    """GB/s of keys and values."""
    pool, table = random_pool(SHAPE, batch * pages_for(context, SHAPE.page_size), CUDA)
    rate = partial(gigabytes, SHAPE.kv_bytes(batch * context))
    return tried(decode_steps(batch, context, table), batch, pool, DECODE_VARIANTS, 9, meter, rate, "GB/s")


def decode_parts(meter: DeviceMeter, batch: int, context: int) -> dict[str, Any]:
    """Microseconds of decode attention as it is, of its parts, and of reading the same pages and nothing else: through
    the table, and in one piece."""
    pool, table = random_pool(SHAPE, batch * pages_for(context, SHAPE.page_size), CUDA)
    planned, q = attention(decode_steps(batch, context, table), DECODE_VARIANTS[0]), queries(batch)

    def whole() -> Tensor:
        return planned.attend(q, q, q, pool, None)

    works: dict[str, Work] = {"splits and merge": whole, "splits alone": whole}
    works["merge alone"] = partial(merge_alone, planned, q)
    works["pages in one piece"] = pool.view(torch.float32).sum
    for count in READERS:
        works[f"pages through the table, {count} programs"] = partial(
            read_pages, pool, table, programs(count, len(table))
        )
    found: dict[str, Any] = {}
    for name, work in works.items():
        merge = splits_alone if name == "splits alone" else cuda.merge_splits
        try:
            with mock.patch.object(cuda, "merge_splits", merge):
                found[name] = round(1e6 * median(meter, work, 9), 1)
        except Exception as error:
            found[name] = failure(error)
    return found


def prefill_row(meter: DeviceMeter, tokens: int) -> dict[str, Any]:
    """TFLOP/s."""
    pool, table = random_pool(SHAPE, pages_for(tokens, SHAPE.page_size), CUDA)

    def rate(taken: float) -> float:
        return round(SHAPE.prefill_flops(tokens) / taken / 1e12, 1)

    return tried(prefill_steps(tokens, table), tokens, pool, PREFILL_VARIANTS, 5, meter, rate, "TFLOP/s")


def compile_share(number: int, count: int) -> None:
    """Launches every `count`-th binary once, on little: Triton keeps in its cache what that compiles."""
    pool, table = random_pool(SHAPE, 2 * pages_for(COMPILED_TOKENS, SHAPE.page_size), CUDA)
    pages = table[: len(table) // 2]

    def launch(steps: list[SequenceStep], rows: int, variant: Variant) -> None:
        q = queries(rows)
        with launched_as(variant):
            attention(steps, variant).attend(q, q, q, pool, None)

    works: list[Work] = [partial(read_pages, pool, table, 16)]
    for steps, rows, variants in (
        (decode_steps(1, COMPILED_TOKENS, pages), 1, DECODE_VARIANTS),
        (prefill_steps(COMPILED_TOKENS, pages), COMPILED_TOKENS, PREFILL_VARIANTS),
    ):
        binaries = {tuple(variant.options.items()): variant for variant in variants}
        works += [partial(launch, steps, rows, variant) for variant in binaries.values()]
    for work in works[number::count]:
        with suppress(Exception):  # it fails once more where it is measured
            work()


def main() -> None:
    if sys.argv[1] == "compile":
        compile_share(int(sys.argv[2]), int(sys.argv[3]))
        return
    count = min(8, os.cpu_count() or 1)
    command = [sys.executable, __file__, "compile"]
    compilers = [subprocess.Popen([*command, str(number), str(count)]) for number in range(count)]
    end = time.monotonic() + COMPILE_SECONDS
    for compiler in compilers:
        with suppress(subprocess.TimeoutExpired):
            compiler.wait(max(0.0, end - time.monotonic()))
        compiler.kill()
    probes, meter = Probes(Path(sys.argv[1])), DeviceMeter()
    for batch, context in DECODES:
        probes.ask(partial(decode_row, meter, batch, context), f"decode {batch} x {context}, GB/s")
        probes.ask(partial(decode_parts, meter, batch, context), f"parts of decode {batch} x {context}, us")
    for tokens in PROMPTS:
        probes.ask(partial(prefill_row, meter, tokens), f"prefill of {tokens} tokens, TFLOP/s")
    probes.end()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
