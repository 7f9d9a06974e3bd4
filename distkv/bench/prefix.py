"""`distkv bench prefix`: time to the first token when the cache has the prompt's prefix, by the tier that it lies in.

A prefix is asked one question after another. Each question is answered by an engine that has computed the prefix
under another salt alone (cold), by one that has it on the device, by one whose device is filled by another prompt, so
that it has it on the host, and by a new process that finds it on disk. They take turns, and all must give the same
answer. A prefix that is found must never be slower than computing it.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from distkv.bench.ceilings import CopyCeiling, ReadCeiling, flush
from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.bench.prefix_answers import Answered, answer, answer_in_new_process, warm_up
from distkv.bench.prefix_sizes import Sizes, check_sizes, make_configs
from distkv.bench.prompts import Prompts
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.launch.launch import launch
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column, target
from distkv.storage.disk.page_arrays import ARRAY
from distkv.workers.model.model_config import ModelConfig

VARIANTS = {
    "cold": "nothing cached",
    "device hit": "prefix on the device",
    "cold, small window": "nothing cached, another prompt must leave the device",
    "host hit": "prefix on the host alone",
    "disk hit after restart": "prefix on disk alone, read by a new process",
}
HITS = ("device hit", "host hit", "disk hit after restart")
COLUMNS = [
    Column("", "variant"),
    Column("prefix tokens", "prefix_tokens"),
    Column("ms to first token", "first_token_ms", form=".1f"),
    Column("of cold", "of_cold", form=".3f"),
    Column("computed again", "most_recomputed"),
    Column("ms to bring alone", "ceiling_ms", form=".1f"),
]


def run(
    model: Path, prefix_tokens: list[int], answer_tokens: int, dtype: str, page_size: int, num_threads: int | None,
    cache_dir: Path | None, options: BenchOptions,
) -> bool:  # fmt: skip
    """Measures and prints a table; see `distkv bench prefix --help`. Returns whether each prefix was found where it was
    to be found, and all answers to a question were the same.

    Raises ConfigError for options that do not go together.
    """
    prompts = Prompts(model)
    questions = [prompts.question(number) for number in range(options.repeats + 1)]
    lengths = [Sizes(tokens, page_size, answer_tokens) for tokens in sorted(set(prefix_tokens))]
    for sizes in lengths:
        check_sizes(sizes, max(map(len, questions)), ModelConfig.load(model).max_position_embeddings)
    bench = Bench(
        "prefix", options, num_threads, model=model.name, dtype=dtype,
        prefix_tokens=[sizes.prefix for sizes in lengths],
        question_tokens=[len(question) for question in questions[1:]], answer_tokens=answer_tokens,
        page_size=page_size, text=prompts.source,
    )  # fmt: skip
    wrong = []
    with bench:
        for sizes in lengths:
            prefix = prompts.text(sizes.prefix)
            with temporary_folder(cache_dir) as folder:
                own = [prefix + question for question in questions]
                wrong.append(_measure(bench, own, sizes, make_configs(model, dtype, sizes, folder)))
        _print(bench)
        return bench.verdict("; ".join(filter(None, wrong)), "All answers to a question are the same, token for token.")


def _measure(bench: Bench, prompts: list[list[int]], sizes: Sizes, configs: dict[str, EngineConfig]) -> str:
    """Adds the rows of one prefix, the first prompt of which is not counted; returns what `_check` does."""
    title = f"prefix of {sizes.prefix}"
    bench.doing(f"{title}: computing it")
    first, *others = prompts
    with ExitStack() as stack:
        with closing(launch(configs["disk"])) as engine:
            _prepare(engine, first, sizes)
            info = engine.info
        assert info.cache_dir is not None
        files = sorted((Path(info.cache_dir) / ARRAY).glob("c.*"))
        flush(files)
        engines = {name: stack.enter_context(closing(launch(configs[name]))) for name in ("device", "host")}
        for engine in engines.values():
            _prepare(engine, first, sizes)
        prefix_bytes = sizes.prefix * info.kv_bytes_per_token
        copies = stack.enter_context(closing(CopyCeiling(prefix_bytes)))
        num_layers = ModelConfig.load(Path(configs["disk"].model)).num_hidden_layers
        reads = stack.enter_context(closing(ReadCeiling(files, num_layers)))
        ceilings: dict[str, Callable[[], float]] = {"memcpy": partial(copies.seconds, prefix_bytes)}
        ceilings |= {f"preadv {way}": partial(reads.seconds, way) for way in reads.ways}
        answered: dict[str, list[Answered]] = {name: [] for name in VARIANTS}
        taken: dict[str, list[float]] = {name: [] for name in ceilings}
        for turn, name in bench.turns([*answered, *ceilings], title, warm_up=0):  # all of them are warm
            if name in ceilings:
                taken[name].append(ceilings[name]())
            else:
                answered[name].append(_answered(name, engines, configs["disk"], files, others[turn], f"{turn}", sizes))
    for row in _rows(answered, taken):
        bench.add({"prefix_tokens": sizes.prefix, "step_tokens": sizes.step_tokens, "prefix_bytes": prefix_bytes} | row)
    return _check(answered, sizes)


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
            where = f"{name}, prefix of {full}, question {number}"
            tier = max(range(3), key=expected[name].__getitem__)
            found = tuple(count + one.recomputed * (index == tier) for index, count in enumerate(one.cached))
            if found != expected[name]:
                return (
                    f"{where}: device, host and disk had {found} tokens of the prompt, and not {expected[name]}; "
                    "report it"
                )
            cold = answered["cold"][number].tokens
            if one.tokens != cold:
                pairs = zip(one.tokens, cold, strict=False)
                place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(cold)))
                return f"{where}: its answer and that of cold differ from token {place} on; report it"
    return ""


def _rows(answered: dict[str, list[Answered]], ceilings: dict[str, list[float]]) -> list[dict[str, Any]]:
    cold = statistics.median(one.seconds for one in answered["cold"])
    medians = {way: 1e3 * statistics.median(times) for way, times in ceilings.items()}
    copying = medians.pop("memcpy")
    alone = {"host hit": copying, "disk hit after restart": min(medians.values())}
    rows = []
    for name, turns in answered.items():
        seconds = Figure.of(one.seconds for one in turns)
        rows.append(
            {
                "variant": name,
                "cached": dict(zip(("device", "host", "disk"), turns[0].cached, strict=True)),
                "recomputed": [one.recomputed for one in turns],
                "first_token_ms": seconds.scaled(1e3),
                "turns_ms": [1e3 * one.seconds for one in turns],
                "of_cold": seconds.median / cold,
                "times_faster_than_cold": cold / seconds.median,
                "ceiling_ms": alone.get(name),
                "bytes_from_disk": [one.bytes_from_disk for one in turns],
                "answers": [one.tokens for one in turns],
            }
        )
    rows[0]["ceiling_seconds"] = ceilings
    return rows


def _print(bench: Bench) -> None:
    bench.table(COLUMNS, [row | {"most_recomputed": max(row["recomputed"]) or None} for row in bench.rows])
    slowest = max((row for row in bench.rows if row["variant"] in HITS), key=lambda row: row["of_cold"])
    what = f"{slowest['of_cold']:.3f} at most ({slowest['variant']}, {slowest['prefix_tokens']} tokens)"
    for line in (
        target("a hit takes less than cold, at every length", what, slowest["of_cold"] < 1),
        "Computed again: tokens that were found, since that was faster by the rates that the engine has measured. To "
        "bring alone: to copy the bytes of the prefix in memory, and to read them from disk with preadv, page cache "
        "dropped. What a hit takes beyond that of the device is what bringing them costs.",
        "Times are medians, from adding a tokenised request to its first token. Engines are warm; the new process has "
        "loaded the model and answered another short prompt, and the page cache has forgotten the files.",
        _page_cache_line([row for row in bench.rows if row["variant"] == "disk hit after restart"]),
    ):
        bench.line(line)


def _page_cache_line(rows: list[dict[str, Any]]) -> str:
    """Whether dropping the page cache had the effect that it must have."""
    if any(None in row["bytes_from_disk"] for row in rows):
        return "Whether the prefixes came from the disk or from its page cache, the system does not say."
    fetched = sum(statistics.median(row["bytes_from_disk"]) for row in rows)
    wanted = sum(row["prefix_bytes"] * row["cached"]["disk"] / row["prefix_tokens"] for row in rows)
    if fetched < 0.99 * wanted:
        return (
            f"WARNING: {fetched / 1e6:.1f} of {wanted / 1e6:.1f} MB came from the disk itself, the others from memory, "
            "so this is no measure of a disk; name a folder on one with --cache-dir."
        )
    return f"Until the first tokens of disk hits, {fetched / 1e6:.1f} MB came from the disk itself."
