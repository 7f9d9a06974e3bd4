"""`distkv bench quality`: what codecs and policies of attention cost, and what they save.

Each row is an engine of the same model with other options. It reads long texts, whose tokens it is told one after the
other: how likely it holds each gives the perplexity, and how its distributions differ from those of the whole and exact
cache the divergence. It answers questions about long texts. And a shape with random weights decodes at contexts that no
model at hand can read, which says what a step takes and reads.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.bench.quality.answers import NUM_TOP, Answers, page_spec
from distkv.bench.quality.divergence import divergence, means, perplexity, unlisted
from distkv.bench.quality.plot import write_plot
from distkv.bench.quality.questions import Tokens, answer, make_questions
from distkv.bench.quality.report import columns, explain
from distkv.bench.quality.tasks import QUICK_TASKS, TASKS
from distkv.bench.quality.texts import long_texts
from distkv.bench.quality.timing import time_steps
from distkv.bench.quality.variants import QUICK_ROWS, ROWS, Variant, with_references
from distkv.errors import ConfigError
from distkv.models.shapes import shape_folder
from distkv.reporting.out_file import check_plot_file
from distkv.storage.tier import Tier
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.sampling.sampled_token import TokenLogprobs

PARTS = 7  # of a text's scored tokens, whose divergence is shown apart


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: Path
    rows: tuple[str, ...]  # see `parse_row`; empty for those of the table in docs/quality.md
    text_tokens: int
    read_tokens: int  # the first ones of each text, which are its prompt
    text: Path | None  # in place of licences and sources
    shape: str  # that is timed
    contexts: tuple[int, ...]
    new_tokens: int


def run(sizes: Sizes, num_threads: int | None, plot_file: Path | None, options: BenchOptions) -> None:
    """Measures, prints a table and draws it; see `distkv bench quality --help`. Raises ConfigError for what cannot be
    measured."""
    check_plot_file(plot_file)
    variants = with_references(sizes.rows or (QUICK_ROWS if options.quick else ROWS))
    _check_sizes(sizes)
    texts, missing = long_texts(sizes.model, sizes.text_tokens, sizes.text, sizes.read_tokens + PARTS)
    with Bench(
        "quality", options, num_threads, model=sizes.model.name, text_tokens=sizes.text_tokens,
        read_tokens=sizes.read_tokens, num_top=NUM_TOP, shape=sizes.shape, new_tokens=sizes.new_tokens,
    ) as bench:  # fmt: skip
        questions, too_long = make_questions(sizes.model, texts, QUICK_TASKS if options.quick else TASKS)
        bench.facts["missing"] = missing + too_long
        for one in bench.facts["missing"]:
            bench.line(f"missing: {one}")
        measure(bench, sizes, variants, texts, questions, num_threads)
        add_times(bench, sizes, variants, num_threads)
        bench.table(columns(list(texts), sizes.contexts, bench.rows), across=True)
        explain(bench)
        if plot_file is not None:
            write_plot(plot_file, bench.facts, bench.rows)


def measure(
    bench: Bench, sizes: Sizes, variants: list[Variant], texts: dict[str, list[int]], questions: list[Tokens],
    num_threads: int | None,
) -> None:  # fmt: skip
    """Adds a row for each variant; references come before those that are compared with them."""
    longest = max(sizes.text_tokens + 1, *(one.num_tokens for one in questions))
    exact: dict[Variant, dict[str, list[TokenLogprobs]]] = {}
    for variant in variants:
        bench.doing(f"{variant.label}: starting")
        start = time.perf_counter()
        with Answers(sizes.model, variant, longest, num_threads) as engine:
            bench.doing(f"{variant.label}: reading texts")
            scores = {name: engine.score(text, sizes.read_tokens) for name, text in texts.items()}
            bench.doing(f"{variant.label}: answering questions")
            tasks_row = answer(engine, sizes.model, questions)
        if variant == variant.reference:
            exact[variant] = scores
        spec = page_spec(ModelConfig.load(sizes.model), variant)
        row: Row = {"name": variant.name, **variant.options} | {
            f"{tier.name.lower()}_bytes_per_token": spec.page_bytes_in(tier) / spec.page_size for tier in Tier
        }
        read_texts = {name: text[sizes.read_tokens :] for name, text in texts.items()}
        row |= compare(read_texts, exact[variant.reference], scores) | tasks_row
        bench.add(row | {"seconds": time.perf_counter() - start})


def add_times(bench: Bench, sizes: Sizes, variants: list[Variant], num_threads: int | None) -> None:
    """Completes the rows by what a step takes and reads at each context, measured in turns."""
    contexts = sorted(sizes.contexts)
    with shape_folder(sizes.shape, max_position_embeddings=2 * contexts[-1]) as folder:
        works = {
            one.label: partial(time_steps, folder, one, contexts, sizes.new_tokens, num_threads) for one in variants
        }
        taken = bench.in_turns(works, "long contexts", warm_up=0)
    for row, turns in zip(bench.rows, taken.values(), strict=True):
        for context in contexts:
            row[f"ms_{context}"] = Figure.of(turn[context].ms for turn in turns)
            row[f"streamed_bytes_{context}"] = turns[0][context].streamed_bytes
        row["read_share"] = turns[0][contexts[-1]].read_share
    bench.write()


def compare(
    texts: dict[str, list[int]], exact: dict[str, list[TokenLogprobs]], scores: dict[str, list[TokenLogprobs]]
) -> Row:
    """What the scores of some tokens of each text say beside those of the reference."""
    row: Row = {}
    nats, apart = [], []
    for name, text in texts.items():
        pairs = zip(text, exact[name], scores[name], strict=True)
        divergences = [divergence(token, ours, theirs) for token, ours, theirs in pairs]
        row |= {
            f"perplexity_{name}": perplexity(scores[name]),
            f"added_{name}": perplexity(scores[name]) / perplexity(exact[name]) - 1,
            f"divergence_{name}": fmean(divergences),
            f"divergence_by_position_{name}": means(divergences, PARTS),
            f"unlisted_{name}": unlisted(exact[name]),
        }
        apart += divergences
        nats += [ours.logprob - theirs.logprob for ours, theirs in zip(exact[name], scores[name], strict=True)]
    return row | {"added": math.expm1(fmean(nats)), "divergence": fmean(apart)}


def _check_sizes(sizes: Sizes) -> None:
    positions = ModelConfig.load(sizes.model).max_position_embeddings
    if not 1 <= sizes.read_tokens <= sizes.text_tokens - PARTS or sizes.text_tokens >= positions:
        raise ConfigError(
            f"text-tokens is {sizes.text_tokens} and read-tokens {sizes.read_tokens}; use {PARTS} less at least for "
            f"the second than for the first, and for that less than {positions}, the model's positions"
        )
