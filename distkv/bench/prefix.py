"""`distkv bench prefix`: time to the first token when the cache has the prompt's prefix, by the tier that it lies in.

A long prefix is asked one question after another. Each question is answered by an engine that has computed the prefix
under another salt alone (cold), by one that has it on the device, by one whose device is filled by another prompt, so
that it has it on the host, and by a new process that finds it on disk. They take turns, and all must give the same
answer.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distkv.bench.ceilings import CopyCeiling, ReadCeiling, flush
from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.bench.prefix_answers import Answered, answer, answer_in_new_process, warm_up
from distkv.bench.prompts import Prompts
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.errors import ConfigError
from distkv.launch.launch import launch
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column
from distkv.storage.disk.cache_folder import ARRAY
from distkv.storage.dtypes import ITEM_BYTES
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.paging import check_page_size
from distkv.workers.model.model_config import ModelConfig

VARIANTS = {
    "cold": "nothing cached",
    "device hit": "prefix on the device",
    "cold, small window": "nothing cached, another prompt must leave the device",
    "host hit": "prefix on the host alone",
    "disk hit after restart": "prefix on disk alone, read by a new process",
}
TARGETS = {"host hit": 20.0, "disk hit after restart": 10.0}  # how many times as fast as cold
COLUMNS = [
    Column("", "variant"),
    Column("cached tokens", "where"),
    Column("ms to first token", "first_token_ms", form=".1f"),
    Column("vs cold", "times_faster_than_cold", form=".1f", ending="x"),
    Column("target", "verdict"),
]
STEP_TOKENS = 2048  # the most of a step, as an engine has it unless told otherwise


@dataclass(frozen=True)
class Sizes:
    """The sizes of the prompts."""

    prefix: int  # tokens, whole pages
    page_size: int
    answer: int  # tokens

    @property
    def request_pages(self) -> int:
        """The pages of the prefix, and one for question and answer."""
        return self.prefix // self.page_size + 1

    @property
    def step_tokens(self) -> int:
        """Whole pages of which the prefix is a multiple, so that the question is read in a step of its own whether the
        prefix is cached or not: that rounds alike."""
        pages = self.prefix // self.page_size
        most = max(1, STEP_TOKENS // self.page_size)
        return self.page_size * max(count for count in range(1, most + 1) if pages % count == 0)


def run(
    model: Path, prefix_tokens: int, answer_tokens: int, dtype: str, page_size: int, num_threads: int | None,
    cache_dir: Path | None, options: BenchOptions,
) -> bool:  # fmt: skip
    """Measures and prints a table; see `distkv bench prefix --help`. Returns whether the prefix was found where it was
    to be found, and all answers to a question were the same.

    Raises ConfigError for options that do not go together.
    """
    prompts = Prompts(model)
    prefix = prompts.text(prefix_tokens)
    questions = [prompts.question(number) for number in range(options.repeats + 1)]
    sizes = Sizes(prefix_tokens, page_size, answer_tokens)
    _check_sizes(sizes, max(map(len, questions)), ModelConfig.load(model).max_position_embeddings)
    bench = Bench(
        "prefix", options, num_threads, model=model.name, dtype=dtype, prefix_tokens=prefix_tokens,
        question_tokens=[len(question) for question in questions[1:]], answer_tokens=answer_tokens,
        page_size=page_size, step_tokens=sizes.step_tokens, text=prompts.source,
    )  # fmt: skip
    first, *others = [prefix + question for question in questions]
    with bench, ExitStack() as stack:
        bench.doing("computing the prefix")
        folder = stack.enter_context(temporary_folder(cache_dir))
        configs = _configs(model, dtype, sizes, folder)
        with closing(launch(configs["disk"])) as engine:
            _prepare(engine, first, sizes)
            info = engine.info
        assert info.cache_dir is not None
        files = sorted((Path(info.cache_dir) / ARRAY).glob("c.*"))
        flush(files)
        engines = {name: stack.enter_context(closing(launch(configs[name]))) for name in ("device", "host")}
        for engine in engines.values():
            _prepare(engine, first, sizes)
        prefix_bytes = prefix_tokens * info.kv_bytes_per_token
        copies = stack.enter_context(closing(CopyCeiling(prefix_bytes)))
        reads = stack.enter_context(closing(ReadCeiling(files, ModelConfig.load(model).num_hidden_layers)))
        ceilings: dict[str, Callable[[], float]] = {"memcpy": partial(copies.seconds, prefix_bytes)}
        ceilings |= {f"preadv {way}": partial(reads.seconds, way) for way in reads.ways}
        answered: dict[str, list[Answered]] = {name: [] for name in VARIANTS}
        bench.facts["prefix_bytes"] = prefix_bytes
        bench.facts["ceiling_seconds"] = {name: [] for name in ceilings}
        for turn, name in bench.turns([*answered, *ceilings], warm_up=0):  # all of them are warm
            if name in ceilings:
                bench.facts["ceiling_seconds"][name].append(ceilings[name]())
            else:
                answered[name].append(_answered(name, engines, configs["disk"], files, others[turn], f"{turn}", sizes))
        for row in _rows(answered):
            bench.add(row)
        return _print(bench, _check(answered, sizes))


def _check_sizes(sizes: Sizes, question: int, positions: int) -> None:
    size = sizes.page_size
    check_page_size(size)
    if sizes.prefix % size or sizes.prefix < 2 * size:
        raise ConfigError(
            f"prefix-tokens {sizes.prefix} is not a whole number of pages of {size} tokens, at least 2; use "
            f"{max(2, -(-sizes.prefix // size)) * size}"
        )
    if question + sizes.answer > size:
        raise ConfigError(
            f"a question of {question} tokens and an answer of {sizes.answer} do not fit a page of {size}, so they "
            "would be cached too; lower answer-tokens or raise page-size"
        )
    if sizes.request_pages * size > positions:
        raise ConfigError(
            f"prefix-tokens {sizes.prefix} and a page for the answer are more than the {positions} positions of the "
            f"model; use at most {(positions // size - 1) * size}"
        )


def _configs(model: Path, dtype: str, sizes: Sizes, folder: Path) -> dict[str, EngineConfig]:
    """An engine that has room for three requests on the device and none elsewhere, one that has room for one there, and
    one with a disk."""
    config = ModelConfig.load(model)
    itemsize = ITEM_BYTES[config.run_dtype(dtype)]
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    one = sizes.request_pages * sizes.page_size * token_bytes
    spare = MAX_DISK_WRITES * sizes.page_size * token_bytes  # for pages on their way to disk
    pools: dict[str, dict[str, Any]] = {
        "device": {"device_kv_bytes": 3 * one, "host_kv_bytes": 0},
        "host": {"device_kv_bytes": one, "host_kv_bytes": 4 * one},
        "disk": {
            "device_kv_bytes": 3 * one, "host_kv_bytes": 2 * one, "disk_kv_bytes": one + spare, "cache_dir": folder
        },
    }  # fmt: skip
    return {
        name: EngineConfig(
            model, dtype=dtype, page_size=sizes.page_size, num_threads=torch.get_num_threads(), max_num_seqs=1,
            max_model_len=sizes.request_pages * sizes.page_size, max_num_batched_tokens=sizes.step_tokens, **options,
        )
        for name, options in pools.items()
    }  # fmt: skip


def _prepare(engine: EngineClient, prompt: list[int], sizes: Sizes) -> None:
    """Has an engine warm up, and know the prefix."""
    warm_up(engine, prompt)
    answer(engine, prompt, sizes.answer, None)


def _answered(
    variant: str, engines: dict[str, EngineClient], disk_config: EngineConfig, files: list[Path], prompt: list[int],
    salt: str, sizes: Sizes,
) -> Answered:  # fmt: skip
    """Has a question answered in one way; the salt is one that nothing was computed under yet."""
    ways = {
        "cold": ("device", salt),
        "device hit": ("device", None),
        "cold, small window": ("host", salt),  # after which the prefix lies on the host alone
        "host hit": ("host", None),
    }
    if variant in ways:
        name, way = ways[variant]
        return answer(engines[name], prompt, sizes.answer, way)
    return answer_in_new_process(disk_config, files, prompt, sizes.answer)


def _check(answered: dict[str, list[Answered]], sizes: Sizes) -> str:
    """What is wrong: a prefix that was found elsewhere, or an answer that differs; empty when nothing is."""
    full = sizes.prefix
    expected = dict(zip(VARIANTS, ((0, 0, 0), (full, 0, 0), (0, 0, 0), (0, full, 0), (0, 0, full)), strict=True))
    for name, turns in answered.items():
        for number, one in enumerate(turns):
            if one.cached != expected[name]:
                return (
                    f"{name}, question {number}: device, host and disk had {one.cached} tokens of the prompt, and not "
                    f"{expected[name]}; report it"
                )
            cold = answered["cold"][number].tokens
            if one.tokens != cold:
                pairs = zip(one.tokens, cold, strict=False)
                place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(cold)))
                return f"{name} and cold differ in question {number} from token {place} of the answer on; report it"
    return ""


def _rows(answered: dict[str, list[Answered]]) -> list[dict[str, Any]]:
    cold = statistics.median(one.seconds for one in answered["cold"])
    rows = []
    for name, turns in answered.items():
        seconds = Figure.of(one.seconds for one in turns)
        faster, goal = cold / seconds.median, TARGETS.get(name)
        verdict = "met" if goal and faster >= goal else "MISSED"
        rows.append(
            {
                "variant": name,
                "cached": dict(zip(("device", "host", "disk"), turns[0].cached, strict=True)),
                "first_token_ms": seconds.scaled(1e3),
                "turns_ms": [1e3 * one.seconds for one in turns],
                "times_faster_than_cold": faster,
                "target": goal,
                "verdict": f"{goal:g}x {verdict}" if goal else None,
                "bytes_from_disk": [one.bytes_from_disk for one in turns],
                "answers": [one.tokens for one in turns],
            }
        )
    return rows


def _print(bench: Bench, wrong: str) -> bool:
    facts, rows = bench.facts, bench.rows
    shown = [
        row | {"where": ", ".join(f"{count} on {tier}" for tier, count in row["cached"].items() if count) or "none"}
        for row in rows
    ]
    bench.table(COLUMNS, shown)
    medians = {way: 1e3 * statistics.median(times) for way, times in facts["ceiling_seconds"].items()}
    reading = min((way for way in medians if way != "memcpy"), key=lambda way: medians[way])
    for line in (
        f"Ceiling: the {facts['prefix_bytes'] / 1e6:.1f} MB of the prefix take {medians['memcpy']:.1f} ms to copy and "
        f"{medians[reading]:.1f} ms to read from disk ({reading}, page cache dropped). What a hit takes beyond that of "
        "the device is what bringing them costs.",
        "Times are medians, from adding a tokenised request to its first token. Engines are warm; the new process has "
        "loaded the model and answered another short prompt, and the page cache has forgotten the files.",
        _page_cache_line(rows[-1], facts["prefix_bytes"]),
    ):
        bench.line(line)
    return bench.verdict(wrong, "All answers to a question are the same, token for token.")


def _page_cache_line(row: dict[str, Any], prefix_bytes: int) -> str:
    """Whether dropping the page cache had the effect that it must have."""
    if None in row["bytes_from_disk"]:
        return "Whether the prefix came from the disk or from its page cache, the system does not say."
    fetched = statistics.median(row["bytes_from_disk"])
    if fetched < 0.99 * prefix_bytes:
        return (
            f"WARNING: {fetched / 1e6:.1f} MB came from the disk itself, the others from memory, so this is no measure "
            "of a disk; name a folder on one with --cache-dir."
        )
    return f"Until the first token of a disk hit, {fetched / 1e6:.1f} MB came from the disk itself."
