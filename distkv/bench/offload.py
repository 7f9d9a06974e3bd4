"""`distkv bench offload`: what a KV cache that lies below the device costs per token, beside what the machine gives.

The same request is decoded by four engines in turns: with all of its context on the device, with half of it on the
host, and with as much of it as can be on the host or on disk. Every byte that a step streams is counted and must be
what the formula says, nothing else may move meanwhile, and all four must sample the same tokens with the same logprobs.
"""

import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distkv.bench.ceilings import READ_THREADS, CopyCeiling, ReadCeiling
from distkv.bench.decoder import Answer, Decoder, Turn, Variant, least_tokens
from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.config import EngineConfig
from distkv.errors import ConfigError, DistKVError
from distkv.reporting.kv_formula import kv_formula
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS, check_page_size
from distkv.storage.tier import Tier
from distkv.workers.kinds import KINDS
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

COLUMNS = [
    Column("context", "cache"),
    Column("cold tokens", "cold_tokens"),
    Column("MB from host", "host_bytes_per_step", 1e-6, ".2f"),
    Column("MB from disk", "disk_bytes_per_step", 1e-6, ".2f"),
    Column("ms per token", "decode_ms_per_token", form=".2f"),
    Column("GB/s, added time", "gb_per_s_of_added_time", form=".2f"),
    Column("GB/s, whole step", "gb_per_s_of_whole_step", form=".2f"),
    Column("memcpy GB/s", "memcpy_gb_per_s", form=".2f"),
    Column("preadv GB/s", "preadv_gb_per_s", form=".2f"),
]
LEAST_DEVICE_PAGES = 2  # the page that is being written, and the context's first, which is the last to leave


@dataclass(frozen=True)
class Sizes:
    """What is decoded."""

    model: Path
    context: int  # tokens, in whole pages
    new_tokens: int
    dtype: str
    page_size: int
    kv_cache_dtype: str = "auto"
    disk_kv_codec: str = "none"

    @cached_property
    def config(self) -> ModelConfig:
        """Of the model."""
        return ModelConfig.load(self.model)

    @cached_property
    def spec(self) -> PageSpec:
        """The pages of the one rank. Raises ConfigError for a codec that the model cannot have."""
        dtype = self.config.run_dtype(self.dtype)
        return model_page_spec(self.config, self.page_size, dtype, self.kv_cache_dtype, self.disk_kv_codec)


def run(sizes: Sizes, num_threads: int | None, cache_dir: Path | None, options: BenchOptions) -> None:
    """Measures and prints a table; see `distkv bench offload --help`.

    Raises ConfigError for options that do not go together, DistKVError when bytes or answers are not what they must be.
    """
    with make_bench(sizes, num_threads, options) as bench:
        measure(bench, sizes, num_threads, cache_dir)
        _print(bench)


def make_bench(sizes: Sizes, num_threads: int | None, options: BenchOptions, console: Console | None = None) -> Bench:
    """The run of this benchmark. Raises ConfigError for sizes that do not go together."""
    EngineConfig(  # refuses what does not go together
        "/", kv_cache_dtype=sizes.kv_cache_dtype, disk_kv_codec=sizes.disk_kv_codec, cache_dir="/"
    )
    _check_sizes(sizes.context, sizes.page_size, least_tokens(sizes.new_tokens), sizes.config.max_position_embeddings)
    return Bench(
        "offload", options, num_threads, console, model=sizes.model.name, dtype=sizes.dtype,
        kv_cache_dtype=sizes.kv_cache_dtype, disk_kv_codec=sizes.disk_kv_codec, context=sizes.context,
        page_size=sizes.page_size, new_tokens=sizes.new_tokens, formula=kv_formula(sizes.spec),
        bytes_per_token=sizes.spec.page_bytes_in(Tier.HOST) // sizes.page_size,
    )  # fmt: skip


def measure(bench: Bench, sizes: Sizes, num_threads: int | None, cache_dir: Path | None) -> None:
    """Adds a row for each place where the context may lie, that on the device first."""
    config, spec, page_size = sizes.config, sizes.spec, sizes.page_size
    rng = random.Random(sizes.context)
    prompt = [rng.randrange(10, config.vocab_size) for _ in range(sizes.context + 1)]
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder()) if cache_dir is None else cache_dir
        decoders = []
        bench.doing("loading the model")
        for variant in _variants(sizes.context // page_size, spec.format is not None):
            engine_config = EngineConfig(
                sizes.model, dtype=sizes.dtype, kv_cache_dtype=sizes.kv_cache_dtype, page_size=page_size,
                num_threads=num_threads, max_model_len=sizes.context + page_size, max_num_seqs=1,
                max_num_batched_tokens=page_size, **_engine_options(variant, spec, folder),
            )  # fmt: skip
            cold_bytes = variant.cold_pages * spec.page_bytes_in(Tier.HOST)
            decoders.append(stack.enter_context(closing(Decoder(variant, engine_config, cold_bytes))))
        bench.doing("warming up")
        for decoder in decoders:
            decoder.turn(prompt, sizes.new_tokens)
        reads = stack.enter_context(closing(ReadCeiling(decoders[-1].files, spec.num_layers)))
        copies = stack.enter_context(closing(CopyCeiling(max(decoder.cold_bytes for decoder in decoders))))
        _in_turns(bench, decoders, prompt, copies, reads, sizes.new_tokens, page_size)


def check_answers(answers: dict[str, Answer]) -> None:
    """Raises DistKVError unless all sampled the same tokens with the same logprobs, in every bit."""
    (first, expected), *others = answers.items()
    for name, answer in others:
        if answer != expected:
            place = next((n for n, pair in enumerate(zip(answer, expected, strict=False)) if pair[0] != pair[1]), 0)
            raise DistKVError(f"{name} and {first} differ from token {place} of the answer on; report it")


def _check_sizes(context: int, page_size: int, answer: int, positions: int) -> None:
    check_page_size(page_size)
    if context % page_size or context < 4 * page_size:
        raise ConfigError(
            f"context {context} is not a whole number of pages of {page_size} tokens, at least 4; "
            f"use {max(4, -(-context // page_size)) * page_size}"
        )
    if context + page_size > positions:
        raise ConfigError(
            f"context {context} and a page for the answer are more than the {positions} positions of the model; use at "
            f"most {(positions // page_size - 1) * page_size}"
        )
    if answer > page_size:
        raise ConfigError(
            f"warm-up and new-tokens take {answer} tokens and must stay within one page of {page_size}, so that as "
            "many stay cold; lower new-tokens or raise page-size"
        )


def _variants(num_pages: int, coded: bool) -> list[Variant]:
    """Where a context of `num_pages` full pages may lie, beside which one page is being written. What is `coded` needs
    a host, to which pages are copied that stay on the device."""
    half, least = num_pages // 2 + 1, LEAST_DEVICE_PAGES
    return [
        Variant("all on device", num_pages + 1, num_pages + 1 if coded else 0, 0, 0),
        Variant("half on host", half, num_pages + 1, 0, num_pages - (half - 1)),
        Variant("all on host", least, num_pages + 1, 0, num_pages - (least - 1)),
        Variant("all on disk", least, 1, num_pages + 1, num_pages - (least - 1)),
    ]


def _engine_options(variant: Variant, spec: PageSpec, folder: Path) -> dict[str, Any]:
    """Sizes of the tiers as `EngineConfig` takes them."""
    on_host = spec.page_bytes_in(Tier.HOST)
    options: dict[str, Any] = {
        "device_kv_bytes": variant.device * spec.page_bytes_in(Tier.DEVICE),
        "host_kv_bytes": variant.host * on_host,
        "enable_prefix_caching": False,
    }
    if variant.disk:
        ring = EngineConfig(folder, page_size=spec.page_size).min_staging_pages * KINDS["cuda"].load_pieces
        # the least, which CUDA takes out of the host's
        read_ahead = -(-(ring // NUM_BUFFERS) // spec.num_layers) if torch.cuda.is_available() else 0
        spare = MAX_DISK_WRITES  # for pages on their way to disk
        options["host_kv_bytes"] = (variant.host + read_ahead) * on_host
        options["disk_kv_bytes"] = (variant.disk + spare) * spec.page_bytes_in(Tier.DISK)
        options["cache_dir"], options["disk_kv_codec"] = folder, spec.disk_codec
    return options


def _in_turns(
    bench: Bench, decoders: list[Decoder], prompt: list[int], copies: CopyCeiling, reads: ReadCeiling, new_tokens: int,
    page_size: int,
) -> None:  # fmt: skip
    """Variants and ceilings take turns."""
    works: dict[str, Callable[[], Any]] = {
        decoder.variant.name: partial(decoder.turn, prompt, new_tokens) for decoder in decoders
    }
    copied = {decoder.cold_bytes: f"memcpy of {decoder.cold_bytes} bytes" for decoder in decoders if decoder.cold_bytes}
    works |= {name: partial(copies.seconds, num_bytes) for num_bytes, name in copied.items()}
    works |= {f"preadv {way}": partial(reads.seconds, way) for way in reads.ways}
    taken = bench.in_turns(works, warm_up=0)  # of which there has been a turn
    answers = {
        f"{decoder.variant.name}, turn {number}": turn.answer
        for decoder in decoders
        for number, turn in enumerate(taken[decoder.variant.name])
    }
    shortest = min(map(len, answers.values()))  # how long pages are on their way differs
    check_answers({name: answer[:shortest] for name, answer in answers.items()})
    read_rates = {way: Figure.of(taken[f"preadv {way}"]).rate(reads.num_bytes).scaled(1e-9) for way in reads.ways}
    resident_ms = None
    for decoder in decoders:
        row = _row(decoder, taken[decoder.variant.name], page_size, resident_ms)
        resident_ms = resident_ms or row["decode_ms_per_token"].median
        row["tokens_compared"], row["same_answer"] = shortest, True  # else `check_answers` had raised
        row["memcpy_gb_per_s"] = row["preadv_gb_per_s"] = row["preadv_way"] = None
        if decoder.cold_bytes:
            copy_seconds = Figure.of(taken[copied[decoder.cold_bytes]])
            row["memcpy_gb_per_s"] = copy_seconds.rate(decoder.cold_bytes).scaled(1e-9)
        if decoder.variant.disk:
            way = max(read_rates, key=lambda way: read_rates[way].median)
            row["preadv_gb_per_s"], row["preadv_way"] = read_rates[way], way
        bench.add(row)


def _row(decoder: Decoder, turns: list[Turn], page_size: int, resident_ms: float | None) -> dict[str, Any]:
    """Figures of a variant; `resident_ms` is what a token takes with everything on the device."""
    variant = decoder.variant
    steps = sum(len(turn.seconds) for turn in turns)
    step_ms = Figure.of(second for turn in turns for second in turn.seconds).scaled(1e3)
    ms = step_ms.median
    host, disk = sum(turn.host_bytes for turn in turns) / steps, sum(turn.disk_bytes for turn in turns) / steps
    fetched = [turn.bytes_from_disk for turn in turns if turn.bytes_from_disk is not None]
    counted = disk if variant.disk else host
    more_ms = 0 if resident_ms is None else ms - resident_ms
    return {
        "cache": variant.name,
        "device_pages": variant.device,
        "cold_tokens": variant.cold_pages * page_size,
        "host_bytes_per_step": host,
        "disk_bytes_per_step": disk,
        "stored_bytes_per_step": sum(turn.stored_bytes for turn in turns) / steps,
        "bytes_from_disk_per_step": sum(fetched) / steps if variant.disk and len(fetched) == len(turns) else None,
        "decode_ms_per_token": step_ms,
        "turn_ms_per_token": [1e3 * statistics.median(turn.seconds) for turn in turns],
        "gb_per_s_of_whole_step": counted / ms / 1e6 if counted else None,
        "gb_per_s_of_added_time": counted / more_ms / 1e6 if counted and more_ms > 0 else None,
    }


def _print(bench: Bench) -> None:
    bench.table(COLUMNS, across=True)
    last = bench.rows[-1]
    for line in (
        f"Every step streamed exactly {bench.facts['formula']} * cold tokens and moved nothing else, and all turns "
        f"drew the same {last['tokens_compared']} tokens with the same logprobs, bit for bit.",
        "Cold is what is not on the device. There stay the page being written and, with 'all', the context's first.",
        "Added time is ms per token less that with all on the device; nothing is shown where there is none.",
        f"memcpy copies as many bytes as a step streams; preadv reads the same files {last['preadv_way']}, the faster "
        f"way here, in {READ_THREADS} threads.",
        _page_cache_line(last),
    ):
        bench.line(line)


def _page_cache_line(row: dict[str, Any]) -> str:
    """Whether dropping the page cache had the effect that it must have."""
    wanted, fetched = row["stored_bytes_per_step"], row["bytes_from_disk_per_step"]
    if fetched is None:
        return "Whether these bytes came from the disk or from its page cache, the system does not say."
    if fetched < 0.99 * wanted:
        return (
            f"WARNING: {fetched / 1e6:.2f} MB per token came from the disk itself, the others from memory, so this is "
            "no measure of a disk; name a folder on one with --cache-dir."
        )
    return f"The page cache was dropped before each step: {fetched / 1e6:.2f} MB per token came from the disk itself."
