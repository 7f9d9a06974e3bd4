"""`distkv bench serve-offline`: throughput of many requests that are submitted at once, with less and less of their KV
cache on the device.

The requests, of mixed lengths, run with a device window that holds all their pages, half of them and a quarter, and the
host holds the rest. They sample greedily in float32, and every window must give the same answers. No prompt may be
found in the cache. Before the turns that count, all requests run once: a process takes longer for the first products of
a size, which would be held against the first window alone.
"""

import random
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.bench.prompts import Prompts
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.drive import drain, drive
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.sequence import most_pages
from distkv.errors import ConfigError
from distkv.launch.launch import launch
from distkv.reporting.machine import percentile
from distkv.reporting.tables import Column, target
from distkv.sampling_params import SamplingParams
from distkv.storage.paging import check_page_size
from distkv.workers.model.model_config import ModelConfig

WINDOWS = (100, 50, 25)  # percent
TARGET = 0.6  # of the throughput at 100 %, at 50 %
MAX_NUM_SEQS = 64
SHORTEST, MEDIAN, SPREAD = 64, 256, 0.8  # tokens of the prompts: lognormal, SPREAD is the deviation of the logarithm
LEAST_ANSWER = 16
WARM_UP = 32  # tokens
COLUMNS = [
    Column("device window", "window"),
    Column("pages, device + host", "pages"),
    Column("requests at a time", "most_running"),
    Column("seconds in all", "seconds", form=".1f"),
    Column("output tokens/s", "output_tokens_per_s", form=".1f"),
    Column("prompt tokens/s", "prompt_tokens_per_s", form=".0f"),
    Column("throughput vs 100 %", "throughput_vs_100", form=".2f"),
    Column("first token, s, p50 / p99", "first"),
    Column("between tokens, ms, p50 / p99", "between"),
    Column("MB streamed", "_streamed", 1e-6, ".2f"),
    Column("MB to host", "_to_host", 1e-6, ".2f"),
    Column("MB to device", "_to_device", 1e-6, ".2f"),
]
Answers = dict[str, list[int]]
"""The tokens of each request's answer."""


@dataclass(frozen=True)
class Served:
    """All requests on one engine; times in seconds since they were submitted."""

    times: dict[str, list[float]]  # of the tokens of each request
    answers: Answers
    num_cached: int  # tokens of their prompts that were found in the cache
    bytes_moved: dict[str, int]  # bytes by route, see `EngineStats`
    most_running: int  # requests at a time
    peak_pages: int  # that they held at a time

    @property
    def seconds(self) -> float:
        """Until the last token."""
        return max(times[-1] for times in self.times.values())

    @property
    def first_tokens(self) -> list[float]:
        return [times[0] for times in self.times.values()]

    @property
    def between_tokens(self) -> list[float]:
        return [later - earlier for times in self.times.values() for earlier, later in pairwise(times)]


def run(
    model: Path, num_requests: int, longest_prompt: int, longest_answer: int, seed: int, page_size: int,
    num_threads: int | None, options: BenchOptions,
) -> bool:  # fmt: skip
    """Measures and prints a table; see `distkv bench serve-offline --help`. Returns whether all answers were the same.

    Raises ConfigError for options that do not go together.
    """
    config = ModelConfig.load(model)
    _check_sizes(longest_prompt, longest_answer, page_size, config.max_position_embeddings)
    prompts = Prompts(model)
    requests = _requests(prompts, num_requests, longest_prompt, longest_answer, seed)
    all_pages = sum(most_pages(request, page_size, 1) for request in requests)
    page_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * page_size
    bench = Bench(
        "serve-offline", options, num_threads, model=model.name, dtype="float32", requests=num_requests, seed=seed,
        prompt_tokens=[len(request.prompt_token_ids) for request in requests],
        output_tokens=[request.max_tokens for request in requests], text=prompts.source, page_size=page_size,
        kv_pages=all_pages, kv_bytes=all_pages * page_bytes, max_num_seqs=MAX_NUM_SEQS,
    )  # fmt: skip
    served: dict[str, list[Served]] = {f"{percent} %": [] for percent in WINDOWS}
    infos: dict[str, EngineInfo] = {}

    def turn(name: str, percent: int) -> Served:
        device = -(-all_pages * percent // 100)
        engine_config = EngineConfig(
            model, dtype="float32", page_size=page_size, num_threads=torch.get_num_threads(),
            max_num_seqs=MAX_NUM_SEQS, max_model_len=longest_prompt + longest_answer, enable_prefix_caching=False,
            device_kv_bytes=device * page_bytes, host_kv_bytes=(all_pages - device) * page_bytes,
        )  # fmt: skip
        with closing(launch(engine_config)) as engine:
            infos[name] = engine.info
            serve(engine, [_short(requests[0])])
            return serve(engine, requests)

    with bench:
        bench.doing("all requests once, to warm up")
        turn("100 %", 100)
        works = {name: partial(turn, name, percent) for name, percent in zip(served, WINDOWS, strict=True)}
        served = bench.in_turns(works, warm_up=0)
        named = {f"{name}, turn {n}": one for name, turns in served.items() for n, one in enumerate(turns)}
        wrong = first_shortcut(named) or first_difference({name: one.answers for name, one in named.items()})
        for (name, turns), percent in zip(served.items(), WINDOWS, strict=True):
            row = _row(percent, turns, infos[name], requests)
            first = bench.rows[0] if bench.rows else row
            row["throughput_vs_100"] = row["output_tokens_per_s"].median / first["output_tokens_per_s"].median
            bench.add(row)
        return _print(bench, wrong)


def serve(engine: EngineClient, requests: list[EngineRequest]) -> Served:
    """Submits all requests at once and waits for the last token. Raises what a request has failed with."""
    before = engine.stats().bytes_moved
    times: dict[str, list[float]] = {request.request_id: [] for request in requests}
    answers: Answers = {request.request_id: [] for request in requests}
    num_cached = most_running = 0
    start = time.perf_counter()
    for outputs in drive(engine, requests):
        now = time.perf_counter() - start
        for output in outputs:
            times[output.request_id].append(now)
            answers[output.request_id].append(output.token_id)
            num_cached += sum(output.num_cached_tokens)
        most_running = max(most_running, engine.stats().num_running)
    drain(engine)
    stats = engine.stats()
    moved = {route: count - before.get(route, 0) for route, count in stats.bytes_moved.items()}
    return Served(times, answers, num_cached, moved, most_running, stats.peak_pages_in_use)


def first_shortcut(served: dict[str, Served]) -> str:
    """Where a turn was spared work that it was to do; empty when none was."""
    for name, one in served.items():
        if one.num_cached:
            return f"{name} found {one.num_cached} tokens of the prompts in the cache; report it"
    return ""


def first_difference(answers: dict[str, Answers]) -> str:
    """Where an answer differs from that of the first window; empty when all are the same."""
    (first, expected), *others = answers.items()
    for name, answered in others:
        for request_id, tokens in expected.items():
            if answered[request_id] != tokens:
                pairs = zip(answered[request_id], tokens, strict=False)
                place = next(
                    (n for n, (a, b) in enumerate(pairs) if a != b), min(len(answered[request_id]), len(tokens))
                )
                return (
                    f"{name} and {first} differ in request {request_id} from token {place} of the answer on: "
                    f"{answered[request_id][place : place + 4]} and {tokens[place : place + 4]}"
                )
    return ""


def _check_sizes(longest_prompt: int, longest_answer: int, page_size: int, positions: int) -> None:
    check_page_size(page_size)
    if longest_prompt < SHORTEST or longest_answer < LEAST_ANSWER:
        raise ConfigError(
            f"prompts have {SHORTEST} tokens at least and answers {LEAST_ANSWER}; raise longest-prompt, "
            f"{longest_prompt}, or longest-answer, {longest_answer}"
        )
    if longest_prompt + longest_answer > positions:
        raise ConfigError(
            f"longest-prompt {longest_prompt} and longest-answer {longest_answer} are more than the {positions} "
            "positions of the model; lower one of them"
        )


def _requests(prompts: Prompts, count: int, longest_prompt: int, longest_answer: int, seed: int) -> list[EngineRequest]:
    """Each prompt is a piece of the text of its own; prompt lengths are lognormal, answer lengths uniform."""
    generator = random.Random(seed)
    lengths = [
        min(longest_prompt, max(SHORTEST, round(MEDIAN * generator.lognormvariate(0, SPREAD)))) for _ in range(count)
    ]
    answers = [generator.randint(LEAST_ANSWER, longest_answer) for _ in range(count)]
    text = prompts.text(sum(lengths))
    params = SamplingParams(temperature=0, ignore_eos=True)
    requests = []
    for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        requests.append(EngineRequest(str(number), text[:length], params, answer, number))
        text = text[length:]
    return requests


def _short(request: EngineRequest) -> EngineRequest:
    """To warm up with."""
    return EngineRequest("warm-up", request.prompt_token_ids[:WARM_UP], request.params, 4, 0)


def _row(percent: int, turns: list[Served], info: EngineInfo, requests: list[EngineRequest]) -> dict[str, Any]:
    """Medians of the turns."""
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_output = sum(request.max_tokens for request in requests)
    median, seconds = statistics.median, Figure.of(one.seconds for one in turns)
    routes = sorted({route for one in turns for route in one.bytes_moved})
    return {
        "window_percent": percent,
        "device_pages": info.num_pages,
        "host_pages": info.num_host_pages,
        "seconds": seconds,
        "turn_seconds": [one.seconds for one in turns],
        "output_tokens_per_s": seconds.rate(num_output),
        "prompt_tokens_per_s": seconds.rate(num_prompt),
        "first_token_p50_s": median([percentile(one.first_tokens, 0.5) for one in turns]),
        "first_token_p99_s": median([percentile(one.first_tokens, 0.99) for one in turns]),
        "between_tokens_p50_ms": 1e3 * median([percentile(one.between_tokens, 0.5) for one in turns]),
        "between_tokens_p99_ms": 1e3 * median([percentile(one.between_tokens, 0.99) for one in turns]),
        "bytes_per_output_token": {
            route: median([one.bytes_moved.get(route, 0) / num_output for one in turns]) for route in routes
        },
        "most_running": max(one.most_running for one in turns),
        "peak_pages": max(one.peak_pages for one in turns),
    }


def _print(bench: Bench, wrong: str) -> bool:
    shown = [
        row
        | {
            "window": f"{row['window_percent']} %",
            "pages": f"{row['device_pages']} + {row['host_pages']}",
            "first": f"{row['first_token_p50_s']:.2f} / {row['first_token_p99_s']:.2f}",
            "between": f"{row['between_tokens_p50_ms']:.1f} / {row['between_tokens_p99_ms']:.1f}",
            **{ending: _bytes(row, ending) for ending in ("_streamed", "_to_host", "_to_device")},
        }
        for row in bench.rows
    ]
    bench.table(COLUMNS, shown, across=True)
    half = next(row["throughput_vs_100"] for row in bench.rows if row["window_percent"] == 50)
    bench.line(
        f"100 % is {bench.facts['kv_pages']} pages, {bench.facts['kv_bytes'] / 1e6:.0f} MB: the sum over all requests "
        "of the pages that prompt and answer take at their full length, which is what the scheduler promises them. The "
        "host holds the rest, to the page. All are submitted at once; MB are per output token, medians of the turns."
    )
    bench.line(target(f"at 50 % no less than {TARGET:g} of the throughput at 100 %", f"{half:.2f}", half >= TARGET))
    return bench.verdict(wrong, "All windows gave the same answers, token for token.")


def _bytes(row: dict[str, Any], ending: str) -> float:
    """Per output token, of the routes whose names end so."""
    return sum(count for route, count in row["bytes_per_output_token"].items() if route.endswith(ending))
