"""`distkv bench decode`: prefill rate and decode latency of one request, alone or beside a peer engine, in turns."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import torch

from distkv.bench.harness import Bench, Figure, Row
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
    Column("engine", "engine"),
    Column("prefill tokens/s", "prefill_tokens_per_s", form=".0f"),
    Column("decode ms/token", "decode_ms_per_token", form=".2f"),
    Column("prefill vs peer", "prefill_vs_peer", form=".2f", ending="x"),
    Column("decode vs peer", "decode_vs_peer", form=".2f", ending="x"),
]


def run(
    model: Path, peer: str | None, contexts: list[int], new_tokens: int, dtype: str, num_threads: int | None,
    trace: str | Path | None, options: BenchOptions,
) -> None:  # fmt: skip
    """Measures and prints a table; see `distkv bench decode --help`."""
    if peer not in (None, "hf"):
        raise ConfigError(f"peer {peer!r} is not known; use hf")
    bench = Bench(
        "decode", options, num_threads, model=model.name, dtype=dtype, new_tokens=new_tokens,
        transformers=version("transformers"),
    )  # fmt: skip
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
        runners: dict[str, Runner] = {"distkv": distkv_runner(llm)}
        with _Peer(model, dtype, torch.get_num_threads()) if peer == "hf" else nullcontext() as transformers, bench:
            if transformers is not None:
                runners["transformers"] = transformers
            for context in dict.fromkeys(contexts):
                rng = random.Random(context)
                prompt = [rng.randrange(10, llm.info.vocab_size) for _ in range(context)]
                _measure(bench, runners, prompt, new_tokens)
            bench.table(COLUMNS)


def _check_contexts(contexts: list[int], new_tokens: int, positions: int) -> None:
    for context in contexts:
        if not 1 <= context < positions - new_tokens:
            raise ConfigError(
                f"context {context} and {new_tokens + 1} new tokens must be at least 1 and at most {positions} "
                f"together, the model's positions; use a context up to {positions - new_tokens - 1}"
            )


def _measure(bench: Bench, runners: dict[str, Runner], prompt: list[int], new_tokens: int) -> None:
    """Adds a row for each engine, and what distkv's figures are beside those of its peer."""
    works = {name: partial(runner, prompt, new_tokens) for name, runner in runners.items()}
    rows: list[Row] = []
    for name, pairs in bench.in_turns(works, f"context {len(prompt)}").items():
        prefill, decode = (Figure.of(times) for times in zip(*pairs, strict=True))
        rows.append(
            {
                "engine": name,
                "context": len(prompt),
                "prefill_tokens_per_s": prefill.rate(len(prompt)),
                "decode_ms_per_token": decode.scaled(1e3),
            }
        )
    for peer in rows[1:]:
        rows[0]["prefill_vs_peer"] = rows[0]["prefill_tokens_per_s"].median / peer["prefill_tokens_per_s"].median
        rows[0]["decode_vs_peer"] = peer["decode_ms_per_token"].median / rows[0]["decode_ms_per_token"].median
    for row in rows:
        bench.add(row)


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


class _Peer:
    """A `Runner`, transformers in a process of its own: in one process with another engine the threads of both would
    sleep between two operations, see `release_threads`."""

    _runner: Runner  # of the process

    def __init__(self, model: Path, dtype: str, num_threads: int):
        options = model, dtype, num_threads
        self._process = ProcessPoolExecutor(1, get_context("spawn"), initializer=_Peer._load, initargs=options)

    @classmethod
    def _load(cls, model: Path, dtype: str, num_threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        cls._runner = staticmethod(transformers_runner(network.eval().to(device)))

    @classmethod
    def _run(cls, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        return cls._runner(prompt, new_tokens)

    def __call__(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        return self._process.submit(_Peer._run, prompt, new_tokens).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()


def transformers_runner(network: Any, new_cache: Callable[[], Any] = lambda: None) -> Runner:
    """transformers' own LLaMA with its default attention; `new_cache` makes the cache of a call, None for
    DynamicCache."""
    device = network.device

    @torch.inference_mode()
    def runner(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = network(
            torch.tensor([prompt], device=device), past_key_values=new_cache(), use_cache=True, logits_to_keep=1
        )
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()  # waits for the device
        first = time.perf_counter()
        for _ in range(new_tokens):
            out = network(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
        return first - start, (time.perf_counter() - first) / new_tokens

    return runner
