"""`distkv bench stages`: how busy the stages of a pipeline are, and what that gives.

Prompts that nobody has read, then answers to them, with the same number of threads for each stage. A step of M
micro-batches on S stages takes M + S - 1 turns, of which each stage works in M; beside that stand the shares of their
time that stages have worked in.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.bench.prompts import Prompts
from distkv.engine.stats import EngineStats
from distkv.errors import ConfigError
from distkv.llm import LLM
from distkv.reporting.tables import Column
from distkv.sampling_params import SamplingParams

COLUMNS = [
    Column("stages", "stages"),
    Column("requests", "requests"),
    Column("work", "work"),
    Column("tokens/s", "tokens_per_s", form=".1f"),
    Column("micro-batches a step", "micro_batches", form=".1f"),
    Column("stages busy %", "busy_percent", form=".0f"),
    Column("at most, as cut %", "most_percent", form=".0f"),
]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: Path
    stages: tuple[int, ...]
    requests: tuple[int, ...]  # at a time
    prompt_tokens: int
    new_tokens: int
    dtype: str
    page_size: int
    ray_address: str | None


@dataclass(frozen=True)
class Turn:
    """What a turn took, and what the engine counted meanwhile."""

    seconds: float
    before: EngineStats
    after: EngineStats

    def counted(self, name: str) -> Any:
        return getattr(self.after, name) - getattr(self.before, name)


def run(sizes: Sizes, num_threads: int | None, options: BenchOptions) -> bool:
    """Measures and prints a table; see `distkv bench stages --help`. Returns whether answers were the same with any
    number of stages. Raises ConfigError for a prompt that the model cannot take."""
    facts: dict[str, Any] = {"dtype": sizes.dtype, "prompt_tokens": sizes.prompt_tokens, "new_tokens": sizes.new_tokens}
    prompts = Prompts(sizes.model)
    answers: dict[int, dict[str, list[list[int]]]] = {}
    with Bench("stages", options, num_threads, model=sizes.model.name, prompts=prompts.source, **facts) as bench:
        for stages in sizes.stages:
            bench.doing(f"starting {stages} stages")
            with _start(sizes, stages, num_threads) as llm:
                if sizes.prompt_tokens + sizes.new_tokens + 1 > llm.info.max_model_len:
                    raise ConfigError(
                        f"prompts of {sizes.prompt_tokens} tokens and {sizes.new_tokens + 1} more are longer than the "
                        f"model's {llm.info.max_model_len} positions; lower --prompt-tokens"
                    )
                answers[stages] = {}
                for count in sizes.requests:
                    _measure(bench, llm, sizes, stages, count, prompts, answers[stages])
        bench.table(COLUMNS)
        first = answers[sizes.stages[0]]
        others = [stages for stages in sizes.stages if answers[stages] != first]
        wrong = f"answers of {', '.join(map(str, others))} stages are not those of {sizes.stages[0]}" if others else ""
        return bench.verdict(wrong, "Answers are the same with any number of stages.")


def _start(sizes: Sizes, stages: int, num_threads: int | None) -> LLM:
    return LLM(
        sizes.model, pipeline_parallel_size=stages, ray_address=sizes.ray_address if stages > 1 else None,
        dtype=sizes.dtype, page_size=sizes.page_size, num_threads=num_threads, max_num_seqs=max(sizes.requests),
        host_kv_bytes=0,
    )  # fmt: skip


def _measure(
    bench: Bench, llm: LLM, sizes: Sizes, stages: int, count: int, source: Prompts, answers: dict[str, list[list[int]]]
) -> None:
    """Adds the rows of so many requests at a time: of their prompts, and of the answers to them."""
    texts = source.text(sizes.prompt_tokens)
    prompts = [[*texts[number:], *texts[:number]] for number in range(count)]  # which nothing of is shared
    taken: dict[str, list[Turn]] = {"prompts": [], "answers": []}
    for turn, _ in bench.turns([f"{stages} stages"], f"{count} requests"):
        llm.reset_prefix_cache()
        for work, new_tokens in (("prompts", 1), ("answers", sizes.new_tokens + 1)):
            params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
            before, start = llm.stats(), time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            answers[f"{count} {work}"] = [output.outputs[0].token_ids for output in outputs]
            if turn >= 0:
                taken[work].append(Turn(seconds, before, llm.stats()))
    for work, tokens in (("prompts", sizes.prompt_tokens), ("answers", sizes.new_tokens + 1)):
        bench.add(_row(stages, count, work, tokens * count, taken[work]))


def _row(stages: int, count: int, work: str, tokens: int, turns: list[Turn]) -> Row:
    row: Row = {"stages": stages, "requests": count, "work": work}
    row["tokens_per_s"] = Figure.of([turn.seconds for turn in turns]).rate(tokens)
    if stages > 1:
        per_step = [turn.counted("micro_batches") / turn.counted("pipeline_steps") for turn in turns]
        busy = [1 - turn.counted("stage_wait_seconds") / turn.counted("stage_seconds") for turn in turns]
        row["micro_batches"] = Figure.of(per_step)
        row["busy_percent"] = Figure.of([100 * share for share in busy])
        row["most_percent"] = Figure.of([100 * one / (one + stages - 1) for one in per_step])
    return row
