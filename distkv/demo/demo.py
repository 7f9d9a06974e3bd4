"""`distkv demo`: a real model answers a few questions, a table shows what its KV cache takes, a prefix
survives a restart (`restart.py`), and a long text is read with most of the cache below the device
(`long_text.py`)."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distkv.demo import long_text, restart
from distkv.errors import DistKVError
from distkv.llm import LLM
from distkv.sampling_params import RequestOutputKind, SamplingParams
from distkv.storage.dtypes import ITEM_BYTES
from distkv.workers.model.model_config import ModelConfig

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about a library.",
)
MAX_TOKENS = 96


@dataclass(frozen=True)
class Measured:
    """One answer's figures; pages are those in use just before it ended."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_tokens_per_second: float
    pages: int


def run(model: Path, tensor_parallel_size: int) -> None:
    """Asks, answers and measures; raises DistKVError when the cache is not the size that the formula says, or an answer
    depends on where the cache lies."""
    console = Console(highlight=False)
    console.print(f"[dim]loading {model} ...[/dim]")
    start = time.perf_counter()
    with LLM(model, tensor_parallel_size=tensor_parallel_size) as llm:
        console.print(f"[dim]ready after {time.perf_counter() - start:.1f} s[/dim]\n")
        measured = [_ask(console, llm, question) for question in QUESTIONS]
        console.print(_answers_table(measured))
        _show_cache(console, llm, ModelConfig.load(model))
        tokenizer = llm.tokenizer
    restart.run(console, model, tokenizer, tensor_parallel_size)
    long_text.run(console, model, tokenizer, tensor_parallel_size)


def _ask(console: Console, llm: LLM, question: str) -> Measured:
    console.print(f"[bold]> {question}[/bold]")
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": question}])
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.DELTA)
    new_tokens, pages = 0, 0
    times = [time.perf_counter()]
    for output in llm.stream(prompt, params):
        times.append(time.perf_counter())
        [delta] = output.outputs
        console.print(delta.text, end="", markup=False, soft_wrap=True)
        new_tokens += len(delta.token_ids)
        pages = llm.stats().pages_in_use or pages
    console.print("\n")
    further = new_tokens - 1
    return Measured(
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        first_token_seconds=times[1] - times[0],
        decode_tokens_per_second=further / (times[-1] - times[1]) if further else 0.0,
        pages=pages,
    )


def _answers_table(measured: list[Measured]) -> Table:
    table = Table("question", "prompt tokens", "new tokens", "first token", "decode tokens/s", "KV pages")
    for number, one in enumerate(measured, 1):
        table.add_row(
            str(number), str(one.prompt_tokens), str(one.new_tokens), f"{one.first_token_seconds * 1e3:.0f} ms",
            f"{one.decode_tokens_per_second:.1f}", str(one.pages),
        )  # fmt: skip
    return table


def _show_cache(console: Console, llm: LLM, model: ModelConfig) -> None:
    info = llm.info
    layers, heads, dim = model.num_hidden_layers, model.num_key_value_heads, model.head_dim
    formula = 2 * layers * heads * dim * ITEM_BYTES[model.dtype]
    measured = info.pool_bytes / (info.num_pages * info.page_size)
    copies = (
        "" if info.kv_bytes_per_token == formula else f" (KV heads are replicated: {info.kv_bytes_per_token} in all)"
    )
    table = Table("KV bytes per token", "", show_header=True)
    table.add_row(
        f"2 * {layers} layers * {heads} KV heads * {dim} head_dim * {ITEM_BYTES[model.dtype]} bytes", str(formula)
    )
    table.add_row(f"measured: {info.pool_bytes} bytes / {info.num_pages} pages of {info.page_size} tokens{copies}",
                  f"{measured:g}")  # fmt: skip
    console.print(table)
    if measured != info.kv_bytes_per_token:
        raise DistKVError(
            f"the KV cache takes {measured} bytes per token, not {info.kv_bytes_per_token}; please report it"
        )
