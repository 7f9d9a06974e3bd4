"""`distkv bench kernels`: what each kernel reaches on this GPU, beside what the GPU gives at most in the same run.

Every figure is the median of turns in which the kernel, its ceiling and its peer alternate, timed by events of the
device with the cache flushed before each. Results are compared with torch's; the command fails when they differ.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import product
from typing import Any

import torch

from distkv.bench.device import LinkCeiling, MatmulCeiling, MemoryCeiling, Turns
from distkv.bench.harness import Row
from distkv.bench.options import BenchOptions
from distkv.bench.parts import Measurement, check_effect, measured_parts
from distkv.models.shapes import SHAPES
from distkv.reporting.tables import Column, target

PARTS = ("ceilings", "decode", "prefill", "products", "elementwise", "pages")
MODEL = "llama-3-8b"
BATCHES = (1, 8, 32)
CONTEXTS = (8192, 32768, 131072)
PROMPTS = (8192, 32768)
TOKENS = 8192  # of the elementwise kernels: what they move is more than the cache holds
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)  # of the products
SLICE_BYTES = tuple(2**n for n in range(15, 22))  # 32 KiB to 2 MiB
PAGES_BYTES = 2**28  # moved at a time

LARGE_BYTES = 2**28  # of keys and values: with less there is not enough under way at a time to fill a large GPU
TARGETS = {
    "decode": (0.8, "a large read"),
    "prefill": (0.55, "the matrix product's rate"),
    "products": (0.9, "cuBLAS's speed"),  # batch_invariant may be the default where that is reached
}

COLUMNS: dict[str, list[Column]] = {
    "ceilings": [
        Column("ceiling", "name"),
        Column("GB/s", "bytes_per_s", 1e-9, ".1f"),
        Column("TFLOP/s", "flops_per_s", 1e-12, ".0f"),
    ],
    "decode": [
        Column("batch", "batch"),
        Column("context", "context"),
        Column("ms", "ms", 1, ".3f"),
        Column("KV GB/s", "bytes_per_s", 1e-9, ".0f"),
        Column("torch GB/s", "torch_bytes_per_s", 1e-9, ".0f"),
        Column("read GB/s", "read_bytes_per_s", 1e-9, ".0f"),
        Column("share of read", "share", 100, ".0f", " %"),
        Column("own read GB/s", "own_read_bytes_per_s", 1e-9, ".0f"),
        Column("share of own read", "own_share", 100, ".0f", " %"),
        Column("", "note"),
    ],
    "prefill": [
        Column("tokens", "tokens"),
        Column("ms", "ms", 1, ".2f"),
        Column("TFLOP/s", "flops_per_s", 1e-12, ".0f"),
        Column("torch TFLOP/s", "torch_flops_per_s", 1e-12, ".0f"),
        Column("matmul TFLOP/s", "matmul_flops_per_s", 1e-12, ".0f"),
        Column("share of matmul", "share", 100, ".0f", " %"),
    ],
    "products": [
        Column("weight", "weight"),
        Column("rows", "rows"),
        Column("ms", "ms", 1, ".3f"),
        Column("weight GB/s", "bytes_per_s", 1e-9, ".0f"),
        Column("TFLOP/s", "flops_per_s", 1e-12, ".0f"),
        Column("cuBLAS ms", "cublas_ms", 1, ".3f"),
        Column("of cuBLAS's speed", "share", 100, ".0f", " %"),
    ],
    "elementwise": [
        Column("kernel", "kernel"),
        Column("tokens", "tokens"),
        Column("ms", "ms", 1, ".3f"),
        Column("GB/s", "bytes_per_s", 1e-9, ".0f"),
        Column("copy GB/s", "copy_bytes_per_s", 1e-9, ".0f"),
        Column("share of copy", "share", 100, ".0f", " %"),
    ],
    "pages": [
        Column("direction", "direction"),
        Column("KiB per slice", "slice_bytes", 2**-10, ".0f"),
        Column("kernel GB/s", "kernel_bytes_per_s", 1e-9, ".1f"),
        Column("copy engine GB/s", "engine_bytes_per_s", 1e-9, ".1f"),
        Column("one copy GB/s", "link_bytes_per_s", 1e-9, ".1f"),
        Column("faster", "faster"),
    ],
}


def run(only: list[str], batches: list[int], contexts: list[int], prompts: list[int], options: BenchOptions) -> None:
    """Measures and prints tables; see `distkv bench kernels --help`.

    Args:
        batches, contexts: of decode; prompts: tokens of prefill. Where there are none: BATCHES, CONTEXTS and PROMPTS,
            or the first of each when it is to be quick.

    Raises ConfigError without a CUDA device, for a part that there is not or an option of one that is left out;
    DistKVError when a kernel is wrong or fails, after all others are measured.
    """
    check_effect({"batch": (batches, "decode"), "context": (contexts, "decode"), "prompt": (prompts, "prefill")}, only)
    few = 1 if options.quick else None
    figures = partial(_figures, batches or BATCHES[:few], contexts or CONTEXTS[:few], prompts or PROMPTS[:few])
    with (
        torch.inference_mode(),
        measured_parts("kernels", PARTS, COLUMNS, only, options, figures, shape=MODEL) as bench,
    ):
        for line in (
            "Bandwidth counts what is read and what is written. Decode counts keys and values alone, and its time is "
            "that of splits and merge together; prefill counts 4 * heads * head_dim * tokens^2 / 2 operations.",
            "torch is scaled_dot_product_attention with its flash backend on keys and values that lie in one piece, "
            "left out where they do not fit beside the pages. An own read is of the row's pages in one piece: what it "
            "lacks of a large one is how slowly anything of that size begins and ends. Products are those of "
            "batch_invariant, and cuBLAS with swiglu after it where a product is gated.",
            *_targets(bench.rows),
        ):
            bench.line(line)


def ceiling_rows(turns: Turns, memory: MemoryCeiling, matmul: MatmulCeiling, link: LinkCeiling) -> list[dict[str, Any]]:
    """What the device gives at most."""
    works = {"copy": memory.copy, "read": memory.read, "matmul": matmul.run, "in": link.to_device, "out": link.to_host}
    seconds = {name: figure.median for name, figure in turns.seconds(works).items()}
    both = [figure.median for figure in turns.seconds_each((link.to_device, link.to_host))]
    size = link.num_bytes
    rates = {
        "device copy, read and written": memory.copy_bytes / seconds["copy"],
        "device copy, read alone": memory.copy_bytes / 2 / seconds["copy"],
        "device read, nothing written": memory.read_bytes / seconds["read"],
        "pinned host to device": size / seconds["in"],
        "device to pinned host": size / seconds["out"],
        "host to device beside device to host": size / both[0],
        "device to host beside host to device": size / both[1],
        "both at once, sum": 2 * size / max(both),
    }
    rows: list[dict[str, Any]] = [
        {"part": "ceilings", "name": name, "bytes_per_s": rate} for name, rate in rates.items()
    ]
    rate = matmul.flops / seconds["matmul"]
    return [*rows, {"part": "ceilings", "name": f"{matmul.name} product", "flops_per_s": rate}]


def _figures(
    batches: Sequence[int], contexts: Sequence[int], prompts: Sequence[int], part: str, turns: Turns
) -> Iterator[Measurement]:
    """Those of one part; what it allocates is free afterwards."""
    from distkv.bench.kernel_attention import SPARE_BYTES, decode_row, prefill_row
    from distkv.bench.kernel_memory import elementwise_rows, page_rows
    from distkv.bench.kernel_products import product_rows, products
    from distkv.bench.kernel_work import AttentionShape

    shape, device = AttentionShape(), turns.device
    if part == "ceilings":
        with closing(LinkCeiling(device)) as link:
            memory, matmul = MemoryCeiling(device), MatmulCeiling(device, shape.dtype)
            yield Measurement("all of them", lambda: ceiling_rows(turns, memory, matmul, link))
    elif part == "decode":
        memory = MemoryCeiling(device)

        def decode(batch: int, context: int) -> list[Row]:
            if turns.meter.free_bytes() > shape.kv_bytes(batch * context) + SPARE_BYTES:
                return [decode_row(turns, memory, shape, batch, context)]
            return [{"part": part, "batch": batch, "context": context, "note": "does not fit"}]

        for batch, context in product(batches, contexts):
            yield Measurement(f"batch {batch}, context {context}", partial(decode, batch, context))
    elif part == "prefill":
        matmul = MatmulCeiling(device, shape.dtype)

        def prefill(num_tokens: int) -> list[Row]:
            return [prefill_row(turns, matmul, shape, num_tokens)]

        for num_tokens in prompts:
            yield Measurement(f"{num_tokens} tokens", partial(prefill, num_tokens))
    elif part == "products":
        for name, (outputs, depth, gated) in products(SHAPES[MODEL]).items():
            yield Measurement(name, partial(product_rows, turns, name, outputs, depth, gated, shape.dtype, ROWS))
    elif part == "elementwise":
        model = SHAPES[MODEL]
        sizes = TOKENS, model["hidden_size"], model["intermediate_size"]
        memory = MemoryCeiling(device)
        yield Measurement("all of them", lambda: elementwise_rows(turns, memory, shape, *sizes))
    else:
        with closing(LinkCeiling(device, PAGES_BYTES)) as link:
            for size in SLICE_BYTES:
                yield Measurement(f"slices of {size} bytes", partial(page_rows, turns, link, size, PAGES_BYTES))


def _targets(rows: list[dict[str, Any]]) -> Iterator[str]:
    for part, (least, ceiling) in TARGETS.items():
        large = f", of {LARGE_BYTES // 2**20} MiB and more," if part == "decode" else ""
        shares = [
            row["share"]
            for row in rows
            if row["part"] == part and row.get("kv_bytes", LARGE_BYTES) >= LARGE_BYTES and "share" in row
        ]
        if shares:
            share = min(shares)
            yield target(f"{part}{large} at {least:.0%} of {ceiling}", f"{share:.0%} at the least", share >= least)
