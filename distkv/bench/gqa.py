"""`distkv bench gqa`: what fewer KV heads save, on engines that differ in nothing else.

One shape with random weights is run with as many KV heads as query heads (multi-head attention, MHA), with fewer
(grouped-query attention, GQA) and with one (multi-query attention, MQA). Each engine gets the same bytes of KV memory.
A request is decoded alone at a short and at a long context; then more requests of the long context come than can run
at a time. Contexts are random KV, so that no prompt is read. Bytes are those that the engine has allocated and those
that the requests hold, and must be those of the formula.
"""

import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from distkv.bench.decode_times import DecodeTimes
from distkv.bench.engine_rows import weight_bytes
from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.drive import drive
from distkv.engine.protocol import EngineRequest
from distkv.errors import ConfigError
from distkv.launch.launch import launch
from distkv.models.shapes import SHAPES, shape_folder
from distkv.reporting.tables import Column
from distkv.sampling_params import SamplingParams
from distkv.storage.dtypes import ITEM_BYTES
from distkv.storage.paging import check_page_size
from distkv.workers.model.model_config import ModelConfig

SEED = 1
BEYOND = 2  # requests more than the formula has room for: they wait
MHA, GQA, MQA = "MHA", "GQA", "MQA"
COLUMNS = [
    Column("attention", "kind"),
    Column("KV heads", "kv_heads"),
    Column("KV per token, B", "kv_bytes_per_token"),
    Column("per request, MiB", "kv_bytes_per_request", 1 / 2**20, ".1f"),
    Column("weights, MB", "weight_bytes", 1e-6, ".1f"),
    Column("alone, short, ms", "short_ms", form=".2f"),
    Column("alone, long, ms", "long_ms", form=".2f"),
    Column("requests at a time", "capacity"),
    Column("by formula", "capacity_by_formula"),
    Column("ms per step of so many", "batch_ms", form=".2f"),
    Column("tokens/s", "tokens_per_s", form=".0f"),
]


@dataclass(frozen=True)
class Sizes:
    """What is run, and in how much memory."""

    shape: str
    context: int  # tokens of prompt and answer, in whole pages
    new_tokens: int  # of the answer; less than a page, so that a request takes all of its pages with its prompt
    mha_requests: int  # KV memory: what so many requests take with MHA
    page_size: int
    dtype: str

    @property
    def request_pages(self) -> int:
        """Pages of a request."""
        return self.context // self.page_size


@dataclass(frozen=True)
class Decoded:
    """One run of one kind of attention."""

    short_ms: float  # per token of a request alone, medians
    long_ms: float
    batch_ms: float  # per step of as many as run at a time
    capacity: int  # the most requests that a step has run
    allocated: int  # bytes of the pool
    num_pages: int
    held: int  # bytes that one long request takes


def run(sizes: Sizes, num_threads: int | None, options: BenchOptions) -> bool:
    """Measures and prints a table; see `distkv bench gqa --help`. Returns whether all bytes and requests are those of
    the formula.

    Raises ConfigError for sizes that do not go together.
    """
    check_sizes(sizes)
    with Bench(
        "gqa", options, num_threads, shape=sizes.shape, dtype=sizes.dtype, context=sizes.context,
        new_tokens=sizes.new_tokens, page_size=sizes.page_size, mha_requests=sizes.mha_requests,
    ) as bench:  # fmt: skip
        rows, wrong = measure(bench, sizes)
        bench.table(COLUMNS, rows, across=True)
        bench.line(
            f"All have the KV memory of {sizes.mha_requests} requests with MHA. short and long: {sizes.page_size} and "
            f"{sizes.context} tokens; the difference is what attention adds. Weights are random, so this says nothing "
            "of answers: a model has the KV heads that it was trained with."
        )
        for row in rows[1:]:
            bench.line(
                f"{row['kind']} beside MHA: KV bytes 1/{row['kv_saving']:g}, a token at the long context "
                f"{row['long_speedup']:.2f}x as fast, {row['more_requests']:.2f}x the requests at a time, and then "
                f"{row['more_tokens_per_s']:.2f}x the tokens/s."
            )
        return bench.verdict(
            wrong, "Allocated and held bytes are 2 * layers * kv_heads * head_dim * tokens * bytes of the dtype."
        )


def measure(bench: Bench, sizes: Sizes) -> tuple[list[Row], str]:
    """A row for each kind of attention, and where bytes or requests are not those of the formula; empty when all are.

    Raises ConfigError for sizes that do not go together.
    """
    check_sizes(sizes)
    heads = SHAPES[sizes.shape]["num_attention_heads"]
    own = SHAPES[sizes.shape]["num_key_value_heads"]
    kv_heads = {MHA: heads, GQA: own if 1 < own < heads else heads // 2, MQA: 1}
    with ExitStack() as folders:
        paths = {
            kind: folders.enter_context(shape_folder(sizes.shape, num_key_value_heads=count))
            for kind, count in kv_heads.items()
        }
        models = {kind: ModelConfig.load(path) for kind, path in paths.items()}
        page_bytes = {kind: sizes.page_size * kv_bytes_per_token(model, sizes.dtype) for kind, model in models.items()}
        memory = sizes.mha_requests * sizes.request_pages * page_bytes[MHA]
        works: dict[str, Callable[[], Decoded]] = {
            kind: partial(_decode, sizes, paths[kind], memory, memory // page_bytes[kind] // sizes.request_pages)
            for kind in paths
        }
        taken = bench.in_turns(works, sizes.shape)
    rows: list[Row] = []
    wrong = ""
    for kind, runs in taken.items():
        by_formula = memory // page_bytes[kind] // sizes.request_pages
        for one in runs:
            for name, counted, expected in (
                ("pool has bytes", one.allocated, one.num_pages * page_bytes[kind]),
                ("request holds bytes", one.held, sizes.request_pages * page_bytes[kind]),
                ("memory runs requests", one.capacity, by_formula),
            ):
                if counted != expected:
                    wrong = wrong or f"with {kind} the {name}: {counted}, and by the formula {expected}"
        row = _row(sizes, kind, models[kind], runs, by_formula)
        first = rows[0] if rows else row
        row |= {
            "kv_saving": first["kv_bytes_per_token"] / row["kv_bytes_per_token"],
            "long_speedup": first["long_ms"].median / row["long_ms"].median,
            "more_requests": row["capacity"] / first["capacity"],
            "more_tokens_per_s": row["tokens_per_s"].median / first["tokens_per_s"].median,
        }
        bench.add(row)
        rows.append(row)
    return rows, wrong


def kv_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """`2 * layers * kv_heads * head_dim * bytes`, written out here since the engine's own figures are checked by it."""
    itemsize = ITEM_BYTES[model.run_dtype(dtype)]
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * itemsize


def check_sizes(sizes: Sizes) -> None:
    """Raises ConfigError for a shape that is not known, and for sizes by which requests would not take all of their
    pages at once."""
    check_page_size(sizes.page_size)
    if sizes.shape not in SHAPES:
        raise ConfigError(f"shape {sizes.shape!r} is not known; use one of {', '.join(SHAPES)}")
    if sizes.context % sizes.page_size:
        near = max(1, round(sizes.context / sizes.page_size)) * sizes.page_size
        raise ConfigError(f"context {sizes.context} is not in whole pages of {sizes.page_size} tokens; try {near}")
    if sizes.new_tokens >= sizes.page_size:
        raise ConfigError(f"new_tokens {sizes.new_tokens} is not less than a page; lower it to {sizes.page_size - 1}")


def _decode(sizes: Sizes, folder: Path, memory: int, expected: int) -> Decoded:
    """One engine, with the contexts one after the other.

    Args:
        memory: bytes of KV.
        expected: requests of the long context that fit.
    """
    times = DecodeTimes()
    config = EngineConfig(
        folder, load_format="dummy", seed=SEED, dtype=sizes.dtype, page_size=sizes.page_size,
        num_threads=torch.get_num_threads(), max_model_len=sizes.context,
        max_num_seqs=expected + BEYOND, max_num_batched_tokens=max(2048, expected + BEYOND),
        device_kv_bytes=memory, host_kv_bytes=0, enable_prefix_caching=False,
    )  # fmt: skip
    with closing(launch(config, observer=times)) as engine:
        short_ms, _, _ = _run(engine, times, sizes, sizes.page_size, 1)
        long_ms, _, held = _run(engine, times, sizes, sizes.context, 1)
        batch_ms, capacity, _ = _run(engine, times, sizes, sizes.context, expected + BEYOND)
        return Decoded(short_ms, long_ms, batch_ms, capacity, engine.info.pool_bytes, engine.info.num_pages, held)


def _run(engine: EngineClient, times: DecodeTimes, sizes: Sizes, context: int, count: int) -> tuple[float, int, int]:
    """So many requests at once, whose contexts count their answers: the median milliseconds of steps of as many as ran
    at a time, how many these are, and the most bytes that requests held."""
    times.decode_steps.clear()
    params = SamplingParams(temperature=0, max_tokens=sizes.new_tokens, ignore_eos=True)
    generator, prompt = random.Random(SEED), context - sizes.new_tokens
    requests = [
        EngineRequest(
            f"{context}, {number}", [generator.randrange(engine.info.vocab_size) for _ in range(prompt)], params,
            sizes.new_tokens, SEED, synthetic_kv_seed=number,
        )
        for number in range(count)
    ]  # fmt: skip
    held = 0
    for _ in drive(engine, requests):
        held = max(held, engine.stats().tiers["device"].used_bytes)
    most = max(step.batch for step in times.decode_steps)
    return 1e3 * statistics.median(one.seconds for one in times.decode_steps if one.batch == most), most, held


def _row(sizes: Sizes, kind: str, model: ModelConfig, runs: list[Decoded], by_formula: int) -> Row:
    batch_ms = Figure.of(one.batch_ms for one in runs)
    capacity = min(one.capacity for one in runs)
    per_token = runs[0].allocated // (runs[0].num_pages * sizes.page_size)
    return {
        "kind": kind,
        "query_heads": model.num_attention_heads,
        "kv_heads": model.num_key_value_heads,
        "kv_bytes_per_token": per_token,
        "kv_bytes_per_request": runs[0].held,
        "weight_bytes": weight_bytes(model, ITEM_BYTES[model.run_dtype(sizes.dtype)]),
        "short_ms": Figure.of(one.short_ms for one in runs),
        "long_ms": Figure.of(one.long_ms for one in runs),
        "capacity": capacity,
        "capacity_by_formula": by_formula,
        "batch_ms": batch_ms,
        "tokens_per_s": batch_ms.rate(1e3 * capacity),
    }
