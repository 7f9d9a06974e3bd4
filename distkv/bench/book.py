"""`distkv bench book`: what an answer costs when many questions are asked about one long text below the device.

An engine reads the text once. Then its pages lie on the host, or on disk, and 1, 4, 16 and 64 questions about it are
asked at once. Bytes that pass up to the device are counted; each answer must be that of an engine with all on the
device, to which the questions are put one by one.
"""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.bench.prompts import Prompts
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.drive import drain, drive
from distkv.engine.protocol import EngineRequest
from distkv.errors import ConfigError
from distkv.launch.launch import launch
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column
from distkv.sampling_params import SamplingParams
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.paging import pages_for
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

UP = ("host_streamed", "disk_streamed", "disk_to_host", "host_to_device")
"""Routes of what steps read of pages below the device, and of pages that are fetched to stay."""
STREAMED = ("host_streamed", "disk_streamed")
MOST = 1.05  # times what one alone takes, over the number of questions
NO_LIMIT = 2**62  # bytes, so that no step leaves a question out
COLUMNS = [
    Column("text on", "tier"),
    Column("questions", "questions"),
    Column("MB per answer", "bytes_per_answer", unit=1e-6, form=".2f"),
    Column("of 1/N of one alone", "times_share_of_one", form=".3f", ending="x"),
    Column("texts per step", "sweeps_per_step", form=".3f"),
    Column("tokens/s", "tokens_per_s", form=".1f"),
    Column(f"target {MOST}x", "verdict"),
]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: Path
    book_tokens: int
    answer_tokens: int
    questions: tuple[int, ...]  # at a time
    page_size: int
    dtype: str

    def asked(self, turn: int, count: int) -> slice:
        """Which questions are asked in a turn of so many at a time."""
        first = turn * sum(self.questions) + sum(self.questions[: self.questions.index(count)])
        return slice(first, first + count)


@dataclass(frozen=True)
class Asked:
    """Some questions, asked at once."""

    seconds: float  # from adding them until the last token
    steps: int  # that gave tokens
    moved: dict[str, int]  # bytes by route
    answers: list[list[int]]

    def bytes_by(self, routes: tuple[str, ...]) -> int:
        """The bytes of some routes together."""
        return sum(self.moved.get(route, 0) for route in routes)


def run(sizes: Sizes, num_threads: int | None, cache_dir: Path | None, options: BenchOptions) -> bool:
    """Measures and prints a table; see `distkv bench book --help`. Returns whether all answers are those of questions
    that are asked alone.

    Raises ConfigError for sizes that do not go together.
    """
    prompts = Prompts(sizes.model)
    if sizes.book_tokens < 2 * sizes.page_size:
        raise ConfigError(f"book-tokens {sizes.book_tokens} are less than two pages; use {2 * sizes.page_size} or more")
    book = prompts.text(sizes.book_tokens)
    # others in each turn: the pages of a question that was asked before are known, and lie below the device too
    questions = [book + prompts.question(number) for number in range(options.repeats * sum(sizes.questions))]
    config = ModelConfig.load(sizes.model)
    longest = max(map(len, questions)) + sizes.answer_tokens
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"book-tokens {sizes.book_tokens}, a question and answer-tokens {sizes.answer_tokens} are more than the "
            f"{config.max_position_embeddings} positions of the model; use at most "
            f"{sizes.book_tokens - (longest - config.max_position_embeddings)} book-tokens"
        )
    spec = model_page_spec(config, sizes.page_size, config.run_dtype(sizes.dtype))
    pools = _Pools.of(sizes, questions)
    bench = Bench(
        "book", options, num_threads, model=sizes.model.name, dtype=sizes.dtype, book_tokens=sizes.book_tokens,
        question_tokens=[len(question) - len(book) for question in questions], answer_tokens=sizes.answer_tokens,
        page_size=sizes.page_size, step_tokens=pools.step_tokens, book_bytes=pools.book_pages * spec.page_bytes,
        device_kv_bytes=pools.window_pages * spec.page_bytes, text=prompts.source,
    )  # fmt: skip
    with bench, ExitStack() as stack:
        bench.doing("asking each question alone")
        with closing(launch(pools.config(sizes, spec.page_bytes, "device", None))) as engine:
            alone = [_ask(engine, [question], sizes).answers[0] for question in questions]
        folder = stack.enter_context(temporary_folder(cache_dir))
        engines = {}
        for tier in ("host", "disk"):
            bench.doing(f"reading the text, for the {tier}")
            one = stack.enter_context(closing(launch(pools.config(sizes, spec.page_bytes, tier, folder))))
            _ask(one, [book], sizes)
            engines[tier] = one
        variants = {f"{tier}, {count}": (tier, count) for tier in engines for count in sizes.questions}
        taken: dict[str, list[Asked]] = {name: [] for name in variants}
        for turn, name in bench.turns(variants, warm_up=0):
            tier, count = variants[name]
            pools.push_out(engines[tier], tier)
            taken[name].append(_ask(engines[tier], questions[sizes.asked(turn, count)], sizes))
        for name, (tier, count) in variants.items():
            one_alone = taken[f"{tier}, {min(sizes.questions)}"]
            bench.add(_row(tier, count, taken[name], min(sizes.questions), one_alone, bench.facts["book_bytes"]))
        bench.table(COLUMNS)
        expected = {
            name: [alone[sizes.asked(turn, count)] for turn in range(options.repeats)]
            for name, (_, count) in variants.items()
        }
        return _print(bench, _wrong(taken, expected))


@dataclass(frozen=True)
class _Pools:
    """The pages of engines."""

    book_pages: int
    window_pages: int  # of the device: for the own pages of all questions and answers, and the first of the text
    step_tokens: int
    longest: int  # tokens of a request

    @classmethod
    def of(cls, sizes: Sizes, questions: list[list[int]]) -> "_Pools":
        """So that all questions are read in one step, and the engine, which keeps the room of two steps free, brings
        nothing of the text to the device to stay."""
        size, book_pages = sizes.page_size, sizes.book_tokens // sizes.page_size
        longest = max(map(len, questions)) + sizes.answer_tokens
        own = pages_for(longest, size) - book_pages
        window = max(max(sizes.questions) * own + 2, book_pages // 8)
        asked = max(sizes.questions) * (longest - sizes.answer_tokens - book_pages * size)
        return cls(book_pages, window, max(asked, -(-window * size // 2)), longest)

    def config(self, sizes: Sizes, page_bytes: int, tier: str, folder: Path | None) -> EngineConfig:
        """An engine whose text ends up in a tier."""
        some = max(self.book_pages // 16, 1)  # on their way to disk
        spare = 4 * self.window_pages  # for pages of answers that nobody holds any more
        device, host, disk = {
            "device": (self.book_pages + self.window_pages, 0, 0),
            "host": (self.window_pages, self.book_pages + spare, 0),
            "disk": (self.window_pages, some, self.book_pages + spare + MAX_DISK_WRITES),
        }[tier]
        return EngineConfig(
            sizes.model, dtype=sizes.dtype, page_size=sizes.page_size, num_threads=torch.get_num_threads(),
            max_model_len=self.longest, max_num_seqs=max(sizes.questions), max_num_batched_tokens=self.step_tokens,
            device_kv_bytes=device * page_bytes, host_kv_bytes=host * page_bytes,
            disk_kv_bytes=disk * page_bytes or None, cache_dir=folder if disk else None,
            max_cold_bytes_per_step=NO_LIMIT if tier != "device" else None,
        )  # fmt: skip

    def push_out(self, engine: EngineClient, tier: str) -> None:
        """Has pages of random KV take the place of what lies above a tier."""
        above = engine.info.num_pages + (engine.info.num_host_pages if tier == "disk" else 0)
        size, most = engine.info.page_size, self.longest // engine.info.page_size
        above += 2 * (above // most + 1)  # they do not all end in one step
        params = SamplingParams(temperature=0, ignore_eos=True)
        requests = [
            EngineRequest(f"{first}", [0] * (min(most, above - first) * size), params, 1, 0, synthetic_kv_seed=1)
            for first in range(0, above, most)
        ]
        for _ in drive(engine, requests):
            pass
        drain(engine)


def _ask(engine: EngineClient, prompts: list[list[int]], sizes: Sizes) -> Asked:
    """Asks at once, greedily, and waits until what is to be saved is saved."""
    params = SamplingParams(temperature=0, ignore_eos=True)
    requests = [
        EngineRequest(str(number), prompt, params, sizes.answer_tokens, 0) for number, prompt in enumerate(prompts)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    before, steps = engine.stats().bytes_moved, 0
    start = time.perf_counter()
    for outputs in drive(engine, requests):
        steps += bool(outputs)
        for output in outputs:
            answers[int(output.request_id)].append(output.token_id)
    seconds = time.perf_counter() - start
    after = engine.stats().bytes_moved
    drain(engine)
    return Asked(seconds, steps, {route: after[route] - before.get(route, 0) for route in after}, answers)


def _row(
    tier: str, count: int, turns: list[Asked], fewest: int, of_fewest: list[Asked], book_bytes: int
) -> dict[str, Any]:
    up, one_alone = (Figure.of(one.bytes_by(UP) for one in some) for some in (turns, of_fewest))
    times, is_held = up.median / one_alone.median, fewest == 1 < count
    return {
        "tier": tier,
        "questions": count,
        "bytes_per_answer": up.scaled(1 / count),
        "times_share_of_one": times if is_held else None,
        "steps": [one.steps for one in turns],
        "sweeps_per_step": Figure.of(one.bytes_by(STREAMED) / one.steps / book_bytes for one in turns),
        "tokens_per_s": Figure.of(one.seconds for one in turns).rate(sum(map(len, turns[0].answers))),
        "bytes_moved": [one.moved for one in turns],
        "target": MOST,
        "verdict": ("met" if times <= MOST else "MISSED") if is_held else None,
    }


def _wrong(taken: dict[str, list[Asked]], expected: dict[str, list[list[list[int]]]]) -> str:
    """What differs from the answers to questions asked alone; empty when nothing does."""
    for name, turns in taken.items():
        for turn, (one, alone) in enumerate(zip(turns, expected[name], strict=True), 1):
            if one.answers != alone:
                return f"{name}: an answer of turn {turn} is not the one to its question asked alone; report it"
    return ""


def _print(bench: Bench, wrong: str) -> bool:
    facts = bench.facts
    share = facts["device_kv_bytes"] / facts["book_bytes"]
    for line in (
        f"The text has {facts['book_bytes'] / 1e6:.1f} MB of KV; the device holds {share:.0%} of that, for the pages "
        "of questions and answers. Counted is what comes up: what a step streams, and pages that are fetched.",
        "Pages of an answer of its own stay on the device while it is written; what they take on their way down is in "
        "the file (bytes_moved).",
    ):
        bench.line(line)
    return bench.verdict(wrong, "All answers are those to the questions asked alone, with all KV on the device.")
