"""`distkv bench paging`: many requests of seeded lengths with memory reserved for each at its full length, and with
pages on demand.

Both run on the same engine with the same KV memory and pages. An engine that reserves can run as many requests as
`max_model_len` goes into its memory, whatever becomes of them; so the reserving policy admits that many at a time. What
it has reserved and not filled is counted as taken. On demand is what distkv does: a request takes a page when a token
needs it; with as many requests at a time as the memory holds at the mean length of all, which is how one sets
`max_num_seqs` for a traffic that one knows, or with no such limit. None is told how long an answer will be.
"""

import logging
import statistics
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from distkv.bench.decode_times import DecodeStep
from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.bench.paging_report import print_report, step_rows, write_plot
from distkv.bench.paging_serving import PageHolders, Served, serve
from distkv.bench.paging_workload import SOURCE, Conversation, conversations
from distkv.bench.prompts import Prompts
from distkv.bench.serve_offline import first_difference
from distkv.config import EngineConfig
from distkv.errors import ConfigError
from distkv.launch.launch import launch
from distkv.reporting.out_file import check_plot_file
from distkv.storage.page_spec import PageSpec
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

RESERVED, ON_DEMAND, UNLIMITED = "reserved ahead", "on demand", "on demand, no limit"
LEAST_ROUNDS = 2  # how often the KV of all requests fills the memory at least, so that others wait most of the time
MOST_SEQS = 1024  # that a step has room for
MOST_MOMENTS = 400  # that a row keeps for a plot


@dataclass(frozen=True)
class Sizes:
    """What is served, and in how much memory."""

    model: Path
    num_requests: int
    max_model_len: int
    reservations: tuple[int, ...]  # KV memory to try: as much as so many requests of max_model_len take
    page_size: int
    dtype: str
    seed: int = 0


def run(sizes: Sizes, num_threads: int | None, plot_file: Path | None, options: BenchOptions) -> bool:
    """Measures and prints tables; see `distkv bench paging --help`. Returns whether all answers were the same.

    Raises ConfigError for sizes that do not go together.
    """
    check_plot_file(plot_file)
    with Bench(
        "paging", options, num_threads, model=sizes.model.name, dtype=sizes.dtype, page_size=sizes.page_size,
        max_model_len=sizes.max_model_len, requests=sizes.num_requests, seed=sizes.seed, lengths=SOURCE,
    ) as bench:  # fmt: skip
        rows, wrong = measure(bench, sizes)
        print_report(bench, rows)
        if plot_file is not None:
            write_plot(plot_file, rows)
        return bench.verdict(wrong, "All runs gave the same answers, token for token.")


def measure(bench: Bench, sizes: Sizes) -> tuple[list[Row], str]:
    """The rows, and where answers differ; that is empty when they are all the same. A row has as its "part" either
    "policy", of one memory and policy, or "step", of decode steps of one batch.

    Raises ConfigError for sizes that do not go together.
    """
    model = ModelConfig.load(sizes.model)
    prompts, dtype = Prompts(sizes.model), model.run_dtype(sizes.dtype)
    spec = model_page_spec(model, sizes.page_size, dtype)
    if sizes.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {sizes.max_model_len} is more than the {model.max_position_embeddings} positions of the "
            "model; lower it"
        )
    workload = conversations(prompts, sizes.num_requests, sizes.max_model_len, sizes.seed)
    _check_workload(workload, sizes, spec)
    bench.facts |= {
        "prompt_tokens": [len(one.request.prompt_token_ids) for one in workload],
        "answer_tokens": [one.answer_tokens for one in workload],
        "text": prompts.source,
    }
    answers: dict[str, dict[str, list[int]]] = {}
    rows: list[Row] = []
    steps: list[DecodeStep] = []
    for reservations in sizes.reservations:
        taken: dict[str, list[Served]] = {name: [] for name in (RESERVED, ON_DEMAND, UNLIMITED)}
        for turn, policy in bench.turns(taken, f"memory of {reservations} reservations"):
            part = workload if turn >= 0 else workload[: -(-len(workload) // 4)]  # enough to warm up
            served = _serve(sizes, spec, reservations, policy, part)
            if turn >= 0:
                taken[policy].append(served)
                answers[f"{policy}, {reservations} reservations, turn {turn}"] = served.answers
        _check_full(taken, sizes)
        found = [_row(sizes, spec, reservations, policy, runs) for policy, runs in taken.items()]
        for row in found:
            for ratio, name in (("speedup", "output_tokens_per_s"), ("more_running", "running")):
                row[ratio] = row[name].median / found[0][name].median
            bench.add(row)
        rows += found
        steps += [step for runs in taken.values() for one in runs for step in one.decode_steps]
    for row in step_rows(steps):
        bench.add(row)
        rows.append(row)
    return rows, first_difference(answers)


def _serve(sizes: Sizes, spec: PageSpec, reservations: int, policy: str, workload: list[Conversation]) -> Served:
    """One run on an engine of its own."""
    reserved_pages = spec.pages_for(sizes.max_model_len)
    slots = reservations * reserved_pages * sizes.page_size
    mean_length = statistics.mean(one.kv_tokens for one in workload)
    most = {RESERVED: reservations, ON_DEMAND: round(slots / mean_length), UNLIMITED: len(workload)}
    config = EngineConfig(
        sizes.model, dtype=sizes.dtype, page_size=sizes.page_size, num_threads=torch.get_num_threads(),
        max_model_len=sizes.max_model_len, max_num_seqs=min(most[policy], MOST_SEQS),
        device_kv_bytes=slots * spec.bytes_per_token, host_kv_bytes=0, enable_prefix_caching=False,
        batch_invariant=True if torch.cuda.is_available() else None,  # a CPU is in any case
    )  # fmt: skip
    holders = PageHolders()
    with _without_warnings(), closing(launch(config, observer=holders)) as engine:
        return serve(engine, holders, workload, reserved_pages * sizes.page_size if policy == RESERVED else None)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of requests that are preempted: the table counts them."""
    log = logging.getLogger("distkv.engine.engine")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _row(sizes: Sizes, spec: PageSpec, reservations: int, policy: str, runs: list[Served]) -> Row:
    """What the runs of a policy come to; shares are of all slots of the memory, while requests wait for some."""
    slots = reservations * spec.pages_for(sizes.max_model_len) * sizes.page_size
    num_output = sum(map(len, runs[0].answers.values()))
    shares = {name: [one.mean(name) / slots for one in runs] for name in ("held", "coming", "unused")}
    free = [1 - sum(parts) for parts in zip(*shares.values(), strict=True)]
    last = runs[-1]
    return {
        "part": "policy",
        "reservations": reservations,
        "policy": policy,
        "kv_bytes": slots * spec.bytes_per_token,
        "slots": slots,
        "running": Figure.of(one.mean("running") for one in runs),
        "stalled": Figure.of(one.mean("stalled") for one in runs),
        "most_running": max(one.most_running for one in runs),
        "seconds": Figure.of(one.seconds for one in runs),
        "output_tokens_per_s": Figure.of(num_output / one.seconds for one in runs),
        **{f"{name}_share": Figure.of(values) for name, values in shares.items()},
        "free_share": Figure.of(free),
        "preemptions": max(one.num_preemptions for one in runs),
        "moments": [
            {"seconds": at.seconds, "running": at.running, "held": at.held, "taken": at.held + at.coming + at.unused}
            for at in last.moments[:: -(-len(last.moments) // MOST_MOMENTS)]
        ],
    }


def _check_workload(workload: list[Conversation], sizes: Sizes, spec: PageSpec) -> None:
    """Raises ConfigError when memory would hardly be scarce."""
    pages = sum(spec.pages_for(one.kv_tokens) for one in workload)
    most = LEAST_ROUNDS * max(sizes.reservations) * spec.pages_for(sizes.max_model_len)
    if pages < most:
        needed = -(-most * len(workload) // pages)
        raise ConfigError(
            f"{len(workload)} requests of these lengths fill {pages} KV pages, and the memory is to be filled "
            f"{LEAST_ROUNDS} times at least, {most} pages; raise num_requests to about {needed} or lower reservations"
        )


def _check_full(taken: dict[str, list[Served]], sizes: Sizes) -> None:
    if not all(one.was_full for runs in taken.values() for one in runs):
        raise ConfigError(f"there was memory for all {sizes.num_requests} requests at a time; raise num_requests")
