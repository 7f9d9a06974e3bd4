"""`distkv bench scheduler`: what a step costs the leader itself, beside ranks that do nothing.

Many long contexts are decoded by an engine whose ranks answer at once, each time the leader waits for them; so nothing
runs beside the leader, and its parts of a step are timed one by one. The contexts are as long as their page tables:
there are no keys and values, and no prefill.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from distkv.bench.harness import Bench, Figure
from distkv.bench.idle_ranks import IdleRanks, LazyThread
from distkv.bench.options import BenchOptions
from distkv.engine.drive import next_tokens
from distkv.engine.engine import Engine
from distkv.engine.observer import StepObserver
from distkv.engine.protocol import EngineInfo, EngineRequest, StepOutput
from distkv.engine.step import Step
from distkv.errors import ConfigError
from distkv.reporting.machine import percentile
from distkv.reporting.tables import Column, target
from distkv.sampling_params import SamplingParams
from distkv.storage.paging import check_page_size, pages_for

PARTS = {
    "plan": "schedule and plan",
    "book": "book the last step",
    "launch": "launch",
    "answer": "read tokens, extend answers",
    "encode": "encode for followers",
}
TARGET_MS = 1.0  # of "plan", at the median
VOCAB = 16  # so that sampling greedily takes little beside what it takes per row
STEP_TOKENS = 2048  # the most of a step, as an engine has it unless told otherwise
WARM_UP = 32  # steps
MOST_STEPS_TO_BEGIN = 1024  # from the first token of the first answer to that of the last


@dataclass(frozen=True)
class Variant:
    """Where the contexts lie; sizes in pages."""

    name: str
    device: int
    host: int
    most_cold: int  # pages that a step may stream, see `ColdBudget`; 0 for no limit


@dataclass(frozen=True)
class Steps:
    """What was measured of one variant, step by step."""

    seconds: dict[str, list[float]]  # by part, see PARTS
    sample_seconds: list[float]  # of the ranks: greedy sampling from ready-made logits
    num_sampled: list[int]  # tokens
    plan_bytes: list[int]
    gc_seconds: list[float]  # of Python's garbage collector within these parts


class StepTimer(StepObserver):
    """Takes down how long the engine spends on the parts of a step, see PARTS."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def prepared(self, step: Step | None) -> None:
        self._take("plan")

    def reported(self, step: Step) -> None:
        self._last = time.perf_counter()  # what came before was the ranks' time

    def completed(self, step: Step) -> None:
        self._take("book")

    def started(self, step: Step) -> None:
        self._take("launch")

    def emitted(self, outputs: list[StepOutput]) -> None:
        self._take("answer")

    def _take(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def run(num_seqs: int, context: int, steps: int, page_size: int, options: BenchOptions) -> bool:
    """Measures and prints a table; see `distkv bench scheduler --help`. Returns whether every step sampled what it
    had to.

    Raises ConfigError for options that do not go together.
    """
    _check_sizes(num_seqs, context, page_size)
    bench = Bench("scheduler", options, num_seqs=num_seqs, context=context, page_size=page_size, steps=steps)
    variants = {variant.name: variant for variant in _variants(num_seqs, context, steps, page_size)}
    with bench:
        wrong = ""
        measured: dict[str, list[Steps]] = {name: [] for name in variants}
        for _, name in bench.turns(variants, warm_up=0):  # a turn begins with steps that warm up
            info = _info(variants[name], num_seqs, context, steps, page_size)
            ranks, timer = IdleRanks(info), StepTimer()
            with closing(Engine(info, ranks, observer=timer, thread=LazyThread())) as engine:
                one = _measure(engine, ranks, timer, num_seqs, context, steps)
            measured[name].append(one)
            wrong = wrong or _check_tokens(variants[name], one, num_seqs)
            del engine
            gc.collect()
        for name, turns in measured.items():
            bench.add(_row(variants[name], turns))
        return _print(bench, wrong)


def _check_sizes(num_seqs: int, context: int, page_size: int) -> None:
    check_page_size(page_size)
    if num_seqs > STEP_TOKENS // 2:
        raise ConfigError(f"num-seqs {num_seqs} is more than half of the {STEP_TOKENS} tokens of a step; lower it")
    least = max(8 * page_size, num_seqs + 1)
    if context < least:
        raise ConfigError(
            f"context {context} is too short for a quarter of it to be a window and for {num_seqs} lengths, each a "
            f"token shorter than the other; use {least} at least"
        )


def _variants(num_seqs: int, context: int, steps: int, page_size: int) -> list[Variant]:
    most = num_seqs * pages_for(context + _answer_tokens(steps), page_size)
    held = num_seqs * pages_for(context, page_size)
    quarter = max(held // 4, num_seqs + pages_for(STEP_TOKENS, page_size) + 1)
    return [
        Variant("all on device", most, 0, 0),
        Variant("a quarter, host for the rest", quarter, most - quarter, 0),
        Variant("a quarter, host for all", quarter, most, 0),
        Variant("a quarter, cold budget", quarter, most, max(1, (held - quarter) // 2)),
    ]


def _answer_tokens(steps: int) -> int:
    """So many that no answer ends."""
    return MOST_STEPS_TO_BEGIN + WARM_UP + steps


def _info(variant: Variant, num_seqs: int, context: int, steps: int, page_size: int) -> EngineInfo:
    return EngineInfo(
        max_model_len=context + _answer_tokens(steps),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=STEP_TOKENS,
        page_size=page_size,
        num_pages=variant.device,
        num_host_pages=variant.host,
        num_disk_pages=0,
        page_bytes=1,  # so that the cold budget counts pages
        pool_bytes=variant.device,
        kv_bytes_per_token=1,
        vocab_size=VOCAB,
        eos_token_ids=(),
        seed=0,
        cache_dir=None,
        max_cold_bytes_per_step=variant.most_cold,
    )


def _measure(engine: Engine, ranks: IdleRanks, timer: StepTimer, num_seqs: int, context: int, steps: int) -> Steps:
    """Has all contexts made, warms up, and times so many steps."""
    # each a token shorter than the one before, so that pages fill at different steps
    tokens = [1] * context
    params = SamplingParams(temperature=0, ignore_eos=True)
    most = _answer_tokens(steps)
    engine.add(
        [
            EngineRequest(str(number), tokens[number:], params, most, number, synthetic_kv_seed=number)
            for number in range(num_seqs)
        ]
    )
    begun: set[str] = set()
    while len(begun) < num_seqs:
        begun |= {output.request_id for output in next_tokens(engine)}
    for _ in range(WARM_UP):
        next_tokens(engine)
    measured = Steps({part: [] for part in PARTS}, [], [], [], [])
    with _garbage_seconds() as collected:
        for _ in range(steps):
            before = sum(collected)
            ranks.begin()
            timer.begin()
            measured.num_sampled.append(len(next_tokens(engine)))
            timer.seconds["encode"] = ranks.encode_seconds
            for part, times in measured.seconds.items():
                times.append(timer.seconds[part])
            measured.sample_seconds.append(ranks.run_seconds - ranks.encode_seconds)
            measured.plan_bytes.append(ranks.plan_bytes)
            measured.gc_seconds.append(sum(collected) - before)
    return measured


@contextmanager
def _garbage_seconds() -> Iterator[list[float]]:
    """A list to which each garbage collection adds how long it took."""
    seconds: list[float] = []
    start = 0.0

    def watch(phase: str, _: dict[str, int]) -> None:
        nonlocal start
        if phase == "start":
            start = time.perf_counter()
        else:
            seconds.append(time.perf_counter() - start)

    gc.callbacks.append(watch)
    try:
        yield seconds
    finally:
        gc.callbacks.remove(watch)


def _row(variant: Variant, turns: list[Steps]) -> dict[str, Any]:
    """Milliseconds per step of each part and of all together: the median of each turn's medians, and likewise its 99th
    percentile and its longest step."""
    parts = [one.seconds | {"sum": [sum(times) for times in zip(*one.seconds.values(), strict=True)]} for one in turns]

    def figures(of: Callable[[list[float]], float]) -> dict[str, Figure]:
        return {part: Figure.of(1e3 * of(one[part]) for one in parts) for part in parts[0]}

    def median(values: Callable[[Steps], Iterable[float]]) -> float:
        return statistics.median(value for one in turns for value in values(one))

    return {
        "variant": variant.name,
        "device_pages": variant.device,
        "host_pages": variant.host,
        "most_cold_pages_per_step": variant.most_cold or None,
        "ms": figures(statistics.median),
        "p99_ms": figures(lambda times: percentile(times, 0.99)),
        "most_ms": figures(max),
        "draw_ms": 1e3 * median(lambda one: one.sample_seconds),
        "tokens_per_step": median(lambda one: one.num_sampled),
        "plan_bytes": median(lambda one: one.plan_bytes),
        "gc_ms_in_all": 1e3 * sum(seconds for one in turns for seconds in one.gc_seconds),
        "gc_most_ms": 1e3 * max(seconds for one in turns for seconds in one.gc_seconds),
        "steps_ms": {part: [[1e3 * seconds for seconds in one[part]] for one in parts] for part in parts[0]},
    }


def _check_tokens(variant: Variant, measured: Steps, num_seqs: int) -> str:
    """What is wrong with the sampled tokens; empty when nothing is. Without a cold budget nobody waits."""
    for step, count in enumerate(measured.num_sampled):
        if count != num_seqs and not (variant.most_cold and 0 < count < num_seqs):
            return f"{variant.name}: step {step} drew {count} tokens for {num_seqs} sequences; report it"
    return ""


def _print(bench: Bench, wrong: str) -> bool:
    """A line for each part of a step, and a column for each place where the contexts may lie."""
    rows = bench.rows
    shown: list[dict[str, Any]] = [
        {"title": title}
        | {row["variant"]: f"{row['ms'][part].show('.3f')} / {row['p99_ms'][part].median:.2f}" for row in rows}
        for part, title in (PARTS | {"sum": "sum"}).items()
    ]
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("pages on device + host", lambda row: f"{row['device_pages']} + {row['host_pages']}"),
        ("tokens per step", lambda row: f"{row['tokens_per_step']:.0f}"),
        ("bytes of the plan", lambda row: f"{row['plan_bytes']:.0f}"),
        ("garbage collection, in all", lambda row: f"{row['gc_ms_in_all']:.1f}"),
        ("the longest one", lambda row: f"{row['gc_most_ms']:.1f}"),
        ("beside it, greedy draws", lambda row: f"{row['draw_ms']:.3f}"),
    ]
    shown += [{"title": title} | {row["variant"]: figure(row) for row in rows} for title, figure in lines]
    variants = [row["variant"] for row in rows]
    bench.table([Column("ms per step, median / p99", "title"), *(Column(name, name) for name in variants)], shown)
    for row in rows:
        plan = row["ms"]["plan"].median
        what = f"planning a step under {TARGET_MS:g} ms at the median"
        bench.line(target(what, f"{plan:.3f} with {row['variant']}", plan < TARGET_MS))
    bench.line(
        "To plan is to choose the step, give it pages, move pages and write the plan; to launch, to say how to draw "
        "and hand the step over. The ranks do nothing, and run when the leader waits for them, so that "
        f"nothing competes with it. Greedy draws are from ready-made logits, vocabulary {VOCAB}. Garbage collection is "
        "part of the figures above it. Prefix caching has no part in any: what nobody has read has no keys."
    )
    return bench.verdict(wrong, "Every step drew a token for each sequence that took part.")
