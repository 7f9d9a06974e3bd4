"""An act of `distkv demo`: a text is read once, and a second engine finds its KV pages on disk.

Both engines answer a question about the same text, in a cache folder of their own that lasts as long as this act.
"""

import graphlib
import inspect
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distkv.cache_folders.upkeep import list_caches
from distkv.errors import DistKVError
from distkv.frontend.tokenizer import Tokenizer
from distkv.llm import LLM
from distkv.outputs import RequestOutput, join_deltas
from distkv.reporting.out_file import temporary_folder
from distkv.sampling_params import RequestOutputKind, SamplingParams

TEXT = "Here is a part of the source of a module of Python:"
QUESTIONS = (
    "What is the module about? Answer in one sentence.",
    "What does the method is_active do? Answer in one sentence.",
)
TEXT_TOKENS = 2000
MAX_TOKENS = 64
PAGE_SIZE = 64
TIER_BYTES = "1GiB"  # of each tier; far more than the text takes


@dataclass(frozen=True)
class Asked:
    """An answer's figures."""

    output: RequestOutput
    first_token_seconds: float


def run(console: Console, model: Path, tokenizer: Tokenizer, tensor_parallel_size: int) -> None:
    """Asks, closes the engine, and asks again; raises DistKVError when the second engine finds nothing on disk."""
    text = tokenizer.decode(tokenizer.encode(inspect.getsource(graphlib))[:TEXT_TOKENS])
    console.print(f"\n[bold]> {TEXT} ...[/bold]\n[dim]graphlib of the standard library, {TEXT_TOKENS} tokens[/dim]\n")
    with temporary_folder() as folder:
        first, second = (
            _ask(console, model, folder, tensor_parallel_size, f"{TEXT}\n\n{text}\n\n{question}", question)
            for question in QUESTIONS
        )
        console.print(_table(first, second))
        if not second.output.num_cached_tokens_by_tier["disk"]:
            raise DistKVError("the second engine found nothing of the text on disk; please report it")
        console.print("\n[dim]distkv cache ls[/dim]")
        list_caches(console, folder)


def _ask(
    console: Console, model: Path, cache_dir: Path, tensor_parallel_size: int, content: str, question: str
) -> Asked:
    """The answer of an engine that is started for it and closed behind it."""
    console.print(f"[bold]> ... {question}[/bold]")
    with LLM(
        model, tensor_parallel_size=tensor_parallel_size, page_size=PAGE_SIZE, cache_dir=cache_dir,
        device_kv_bytes=TIER_BYTES, host_kv_bytes=TIER_BYTES, disk_kv_bytes=TIER_BYTES,
    ) as llm:  # fmt: skip
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": content}])
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.DELTA)
        start = time.perf_counter()
        stream = llm.stream(prompt, params)
        deltas = [next(stream)]
        seconds = time.perf_counter() - start
        deltas += stream
    output = join_deltas(deltas)
    console.print(f"  {output.outputs[0].text}\n", markup=False, soft_wrap=True)
    return Asked(output, seconds)


def _table(*asked: Asked) -> Table:
    table = Table("engine", "prompt tokens", "found on device", "host", "disk", "first token")
    for name, one in zip(("first", "second"), asked, strict=True):
        found = one.output.num_cached_tokens_by_tier
        table.add_row(
            name, str(len(one.output.prompt_token_ids)), *(str(found[tier]) for tier in ("device", "host", "disk")),
            f"{one.first_token_seconds * 1e3:.0f} ms",
        )  # fmt: skip
    return table
