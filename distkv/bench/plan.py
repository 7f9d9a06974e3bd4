"""`distkv bench plan`: what the planner says that a decode step takes, beside what it takes."""

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter

from distkv.bench.calibration import MOST_RATE, calibrated
from distkv.bench.decoder import least_tokens
from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.bench.tier_decoders import PAGE_SIZE, TIERS, TierDecoders
from distkv.errors import ConfigError
from distkv.launch.this_machine import measured_cpu
from distkv.models.shapes import shape_folder
from distkv.planner.hardware import Hardware
from distkv.planner.plan import Plan, make_plan
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column, target

MOST_ERROR = 0.25  # by which a plan may be off
COLUMNS = [
    Column("KV on", "tier"),
    Column("context", "context"),
    Column("planned ms", "planned_ms", form=".2f"),
    Column("measured ms", "measured_ms", form=".2f"),
    Column("ratio", "ratio", form=".2f"),
    Column("fastest", "fastest_ratio", form=".2f"),
    Column("bound by", "bound_by"),
]


def run(
    shape: str, contexts: list[int], probes: list[int], new_tokens: int, num_threads: int | None, options: BenchOptions
) -> None:
    """Measures and prints a table; see `distkv bench plan --help`. Raises ConfigError for contexts that cannot be
    measured, or of which a plan would be told the time."""
    contexts, probes = sorted(set(contexts)), sorted(set(probes))
    _check(contexts, probes, new_tokens)
    longest = max(*contexts, *probes)
    bench = Bench("plan", options, num_threads, shape=shape, new_tokens=new_tokens, probes=probes)
    with (
        shape_folder(shape, max_position_embeddings=longest + PAGE_SIZE) as folder,
        temporary_folder() as cache_dir,
        TierDecoders(folder, shape, longest, cache_dir) as decoders,
        bench,
    ):
        keys = [(tier, context) for context in sorted([*probes, *contexts]) for tier in TIERS]
        works = {
            f"{context} tokens on {tier}": partial(decoders.seconds, tier, context, new_tokens)
            for tier, context in keys
        }
        found = bench.in_turns(works, warm_up=0 if options.quick else 1).values()
        taken = dict(zip(keys, (_Times.of(turns) for turns in found), strict=True))
        bench.doing("reading weights, multiplying and copying")
        machine = measured_cpu()
        by_median, by_fastest = (
            calibrated(machine, decoders.request, {key: pick(taken[key]) for key in keys if key[1] in probes})
            for pick in (attrgetter("figure.median"), attrgetter("fastest"))
        )
        bench.facts |= {"hardware": asdict(by_median), "hardware_by_fastest_steps": asdict(by_fastest)}
        for tier, context in ((tier, context) for tier in TIERS for context in contexts):
            plans = (make_plan(decoders.request(tier, context, one)) for one in (by_median, by_fastest))
            bench.add(_row(tier, context, taken[tier, context], *plans))
        bench.table(COLUMNS)
        _explain(bench, by_median, probes)


@dataclass(frozen=True)
class _Times:
    """Seconds of the steps of one context on one tier."""

    figure: Figure  # of the turns' medians
    fastest: float  # the lower quartile of a turn's steps, of the turn where it is least

    @classmethod
    def of(cls, turns: list[list[float]]) -> "_Times":
        quartiles = (statistics.quantiles(steps, n=4, method="inclusive")[0] for steps in turns)
        return cls(Figure.of(map(statistics.median, turns)), min(quartiles))


def _check(contexts: list[int], probes: list[int], new_tokens: int) -> None:
    for context in (*contexts, *probes):
        if context % PAGE_SIZE or context < 2 * PAGE_SIZE:
            raise ConfigError(
                f"context {context} is not a whole number of pages of {PAGE_SIZE} tokens, at least 2; use "
                f"{max(2, -(-context // PAGE_SIZE)) * PAGE_SIZE}"
            )
    if len(probes) != 2:
        raise ConfigError(f"--probe names {len(probes)} contexts; give it twice, for two that measure the machine")
    both = sorted(set(contexts) & set(probes))
    if both:
        raise ConfigError(f"context {both[0]} is a probe too, so its plan would be told its time; give another one")
    if least_tokens(new_tokens) > PAGE_SIZE:
        most = PAGE_SIZE - least_tokens(0)
        raise ConfigError(f"new-tokens {new_tokens} leaves the page that is being written; use {most} at most")


def _row(tier: str, context: int, times: _Times, plan: Plan, fastest: Plan) -> Row:
    """Of a plan by the medians of all turns, and of one by the fastest steps, each beside what belongs to it."""
    assert plan.decode is not None and fastest.decode is not None
    return {
        "tier": tier,
        "context": context,
        "kv_bytes": context * plan.fit.kv_bytes_per_token,
        "planned_ms": 1e3 * plan.decode.seconds,
        "measured_ms": times.figure.scaled(1e3),
        "ratio": plan.decode.seconds / times.figure.median,
        "planned_fastest_ms": 1e3 * fastest.decode.seconds,
        "measured_fastest_ms": 1e3 * times.fastest,
        "fastest_ratio": fastest.decode.seconds / times.fastest,
        "bound_by": plan.decode.limit,
        "parts": plan.decode.parts,
    }


def _explain(bench: Bench, hardware: Hardware, probes: list[int]) -> None:
    """What was measured to plan with, and whether the target was met."""
    rates = ", ".join(
        f"{name} {rate / 1e9:.2f} GB/s" if rate < MOST_RATE else f"{name} no slower than the device"
        for name, rate in (
            ("weights", hardware.memory_bandwidth), ("attention", hardware.kv_bandwidth), ("host", hardware.host_link),
            ("disk", hardware.disk_bandwidth),
        )
    )  # fmt: skip
    bench.line(
        f"Calibrated in the same turns, by steps at {probes[0]} and {probes[1]} tokens on each tier and by a product "
        f"that reads weights: {rates}, fixed work {1e3 * hardware.step_seconds:.2f} ms. Host and disk count what they "
        "take more than the device. No row of the table has a part in that."
    )
    bench.line("Pages on disk lie in the system's page cache, since they were just written, as in distkv stress.")
    for what, field in (("measured", "ratio"), ("measured of the fastest steps", "fastest_ratio")):
        ratios = [row[field] for row in bench.rows]
        worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
        met = sum(abs(ratio - 1) <= MOST_ERROR for ratio in ratios)
        figure = f"{met} of {len(ratios)}, the worst is {worst:.2f} times as long"
        bench.line(target(f"plans within {MOST_ERROR:.0%} of what was {what}", figure, met == len(ratios)))
    bench.line(
        "Ratios are planned over measured: of the medians of all turns, and of the fastest steps (the lower quartile "
        "of a turn, of the turn where it is least), which others on the machine have disturbed least."
    )
