"""`distkv bench cache`: what a KV cache is for. The same tokens are decoded without a cache, with one that is
concatenated for every token, and with distkv's pages.

Without a cache, the token at position n runs the model on n tokens, so n tokens take n(n+1)/2 rows of attention; with
one they take n. Rows are counted in the attention itself, and the command fails when they are not that many, when the
variants draw other tokens, or when their logits differ: without a cache and with pages in any bit, and concatenated by
more than rounding, since torch's attention adds up in another order.
"""

from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console

from distkv.bench.cache_plot import write_plot
from distkv.bench.cache_variants import CONCATENATED, NO_CACHE, PAGED, VARIANTS, Decoded, SmallModel
from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.bench.prompts import Prompts
from distkv.errors import ConfigError
from distkv.reporting.machine import cpu_name
from distkv.reporting.out_file import check_plot_file
from distkv.reporting.tables import Column
from distkv.storage.paging import check_page_size
from distkv.workers.model.model_config import ModelConfig

LAST = 8  # tokens, whose median stands for the time of the last one
ROUNDING = 1e-4  # of the largest logit, that two ways to add up in float32 may differ by
COLUMNS = [
    Column("tokens", "tokens"),
    Column("cache", "cache"),
    Column("tokens/s", "tokens_per_s", form=".1f"),
    Column("last, ms", "last_token_ms", form=".1f"),
    Column("rows", "attention_rows", form=".0f"),
    Column("MB copied", "copied_bytes", 1e-6, ".1f"),
    Column("speed-up", "times_no_cache", form=".1f", ending="x"),
]


def run(
    model: Path, lengths: list[int], page_size: int, num_threads: int | None, plot_file: Path | None,
    options: BenchOptions,
) -> bool:  # fmt: skip
    """Measures, prints a table and draws it; see `distkv bench cache --help`. Returns whether all that must be equal
    was."""
    check_plot_file(plot_file)
    bench = make_bench(model, lengths, page_size, num_threads, options)
    with bench:
        wrong = measure(bench, model, lengths, page_size)
        bench.table(COLUMNS)
        bench.line(
            f"Fewer tokens are the first ones of the same runs. Last is the median of the last {LAST} tokens. Rows are "
            "those of attention in each layer, counted there. Copied is what torch.cat moves to make room for one "
            "token more. All run in float32 on the CPU, without scheduler and tokenizer."
        )
        if plot_file is not None:
            write_plot(plot_file, bench.facts)
        return bench.verdict(wrong, bench.facts["equal"])


def make_bench(
    model: Path, lengths: list[int], page_size: int, num_threads: int | None, options: BenchOptions,
    console: Console | None = None,
) -> Bench:  # fmt: skip
    """The run of this benchmark. Raises ConfigError for sizes that do not go together."""
    check_page_size(page_size)
    positions = ModelConfig.load(model).max_position_embeddings
    if not 1 <= min(lengths) <= max(lengths) <= positions:
        raise ConfigError(f"lengths are {sorted(lengths)}; each must be from 1 to {positions}, the model's positions")
    bench = Bench(
        "cache", options, num_threads, console, model=model.name, dtype="float32", page_size=page_size,
        lengths=sorted(set(lengths)),
    )  # fmt: skip
    bench.facts["machine"] = cpu_name()  # whatever GPU there is
    return bench


def measure(bench: Bench, model: Path, lengths: list[int], page_size: int) -> str:
    """Adds a row for each length and variant, and the milliseconds of each position to the facts; returns what is
    wrong."""
    lengths = sorted(set(lengths))
    longest = lengths[-1]
    [first] = Prompts(model).text(1)
    bench.doing("loading the model")
    with closing(SmallModel(model, longest, page_size)) as network:
        turns: dict[str, list[Decoded]] = {name: [] for name in VARIANTS}
        warm: dict[str, Decoded] = {}
        for turn, name in bench.turns(VARIANTS, f"{longest} tokens"):
            one = network.decode(name, first, longest, keeps_logits=turn < 0)
            if turn < 0:
                warm[name] = one
            else:
                turns[name].append(one)
        wrong, equal = compare(warm, turns, network.is_exact)
        for length in lengths:
            for row in _rows(turns, length, network.num_layers):
                wrong = wrong or check_rows(row)
                bench.add(row)
    bench.facts["position_ms"] = {
        name: [1e3 * Figure.of(times).median for times in zip(*(one.seconds for one in decoded), strict=True)]
        for name, decoded in turns.items()
    }
    bench.facts["equal"] = equal
    return wrong


def compare(warm: dict[str, Decoded], turns: dict[str, list[Decoded]], is_exact: bool) -> tuple[str, str]:
    """What is wrong, and what is equal where nothing is. `warm` has logits."""
    paged = warm[PAGED]
    for name, decoded in turns.items():
        for one in [warm[name], *decoded]:
            if one.tokens != paged.tokens:
                place = next(n for n, (a, b) in enumerate(zip(one.tokens, paged.tokens, strict=True)) if a != b)
                return f"{name} and {PAGED} draw other tokens from position {place + 1} on; report it", ""
    expected = torch.stack(paged.logits)
    largest = float(expected.abs().max())
    apart = {}
    for name in (NO_CACHE, CONCATENATED):
        apart[name] = float((torch.stack(warm[name].logits) - expected).abs().max()) / largest
        allowed = 0.0 if name == NO_CACHE and is_exact else ROUNDING
        if not apart[name] <= allowed:
            return f"logits of {name} and {PAGED} differ by {apart[name]:.2g} of the largest one; report it", ""
    bits = "in every bit" if not apart[NO_CACHE] else f"within {apart[NO_CACHE]:.1g} of the largest one"
    return "", (
        f"All variants drew the same {len(paged.tokens)} tokens. Logits without a cache and with pages are equal "
        f"{bits}, and those with torch.cat within {apart[CONCATENATED]:.1g} of the largest one."
    )


def _rows(turns: dict[str, list[Decoded]], length: int, num_layers: int) -> list[Row]:
    """Of all variants at one length."""
    rows: list[Row] = []
    for name, decoded in turns.items():
        seconds = Figure.of(sum(one.seconds[:length]) for one in decoded)
        last = Figure.of(Figure.of(one.seconds[max(0, length - LAST) : length]).median for one in decoded)
        rows.append(
            {
                "tokens": length,
                "cache": name,
                "tokens_per_s": seconds.rate(length),
                "last_token_ms": last.scaled(1e3),
                "attention_rows": decoded[0].rows[length - 1] / num_layers,
                "expected_rows": length * (length + 1) // 2 if name == NO_CACHE else length,
                "copied_bytes": decoded[0].copied_bytes[length - 1],
            }
        )
    for row in rows:
        row["times_no_cache"] = row["tokens_per_s"].median / rows[0]["tokens_per_s"].median
    return rows


def check_rows(row: Row) -> str:
    """What is wrong with the counted rows; empty when they are n(n+1)/2 without a cache, and n with one."""
    if row["attention_rows"] != row["expected_rows"]:
        return (
            f"{row['cache']} took {row['attention_rows']:g} rows of attention for {row['tokens']} tokens, and not "
            f"{row['expected_rows']}; report it"
        )
    return ""
