"""`distkv bench decode`: prefill rate and decode latency of one request. `distkv bench peers` has the same beside other
engines."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.errors import ConfigError, DistKVError
from distkv.llm import LLM
from distkv.outputs import RequestOutput
from distkv.reporting.tables import Column
from distkv.sampling_params import SamplingParams

Runner = Callable[[list[int], int], tuple[float, float]]
"""`(prompt, new tokens) -> (seconds to the first token, seconds per further token)`."""
COLUMNS = [
    Column("context", "context"),
    Column("prefill tokens/s", "prefill_tokens_per_s", form=".0f"),
    Column("decode ms/token", "decode_ms_per_token", form=".2f"),
]


def run(
    model: Path, contexts: list[int], new_tokens: int, dtype: str, num_threads: int | None, trace: str | Path | None,
    options: BenchOptions,
) -> None:  # fmt: skip
    """Measures and prints a table; see `distkv bench decode --help`."""
    bench = Bench("decode", options, num_threads, model=model.name, dtype=dtype, new_tokens=new_tokens)
    # every turn has the same prompt, so pages that are kept would spare all but the first one their prefill
    with LLM(
        model,
        dtype=dtype,
        num_threads=num_threads,
        max_num_seqs=1,
        host_kv_bytes=0,
        enable_prefix_caching=False,
        trace=trace,
    ) as llm:
        _check_contexts(contexts, new_tokens, llm.info.max_model_len)
        runner = distkv_runner(llm)
        with bench:
            for context in dict.fromkeys(contexts):
                rng = random.Random(context)
                prompt = [rng.randrange(10, llm.info.vocab_size) for _ in range(context)]
                _measure(bench, runner, prompt, new_tokens)
            bench.table(COLUMNS)


def _check_contexts(contexts: list[int], new_tokens: int, positions: int) -> None:
    for context in contexts:
        if not 1 <= context < positions - new_tokens:
            raise ConfigError(
                f"context {context} and {new_tokens + 1} new tokens must be at least 1 and at most {positions} "
                f"together, the model's positions; use a context up to {positions - new_tokens - 1}"
            )


def _measure(bench: Bench, runner: Runner, prompt: list[int], new_tokens: int) -> None:
    """Adds a row."""
    works = {"distkv": partial(runner, prompt, new_tokens)}
    [pairs] = bench.in_turns(works, f"context {len(prompt)}").values()
    prefill, decode = (Figure.of(times) for times in zip(*pairs, strict=True))
    bench.add(
        {
            "engine": "distkv",
            "context": len(prompt),
            "prefill_tokens_per_s": prefill.rate(len(prompt)),
            "decode_ms_per_token": decode.scaled(1e3),
        }
    )


def distkv_runner(llm: LLM) -> Runner:
    """Raises DistKVError when a turn was anything but a whole prefill and `new_tokens` steps."""

    def runner(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True)
        outputs: list[RequestOutput] = []
        times = [time.perf_counter()]
        for output in llm.stream(prompt, params):
            times.append(time.perf_counter())
            outputs.append(output)
        cached, drawn = outputs[-1].num_cached_tokens, [len(one.outputs[0].token_ids) for one in (outputs[0], output)]
        if cached or drawn != [1, new_tokens + 1]:
            raise DistKVError(
                f"of {len(prompt)} tokens {cached} were found in the cache, and first and last output had {drawn} "
                f"tokens instead of {[1, new_tokens + 1]}: this is no prefill and {new_tokens} steps; report it"
            )
        return times[1] - times[0], (times[-1] - times[1]) / new_tokens

    return runner
