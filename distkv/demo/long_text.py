"""The last act of `distkv demo`: a text whose KV cache is larger than the device may hold is read and asked about.

The cache gets a window of a few pages on the device, a few pages on the host, and a folder on disk. The answer must be
in every bit that of the same model with the whole cache on the device.
"""

import inspect
import time
import timeit
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distkv.config import EngineConfig
from distkv.engine.drive import drive
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.stats import EngineStats
from distkv.errors import DistKVError
from distkv.frontend.tokenizer import Tokenizer
from distkv.launch.launch import launch
from distkv.reporting.live_view import LiveView
from distkv.reporting.out_file import temporary_folder
from distkv.sampling_params import SamplingParams
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.paging import pages_for
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.sampling.sampled_token import TokenLogprobs

TEXT = "Here is the source of a module of Python:"
QUESTION = "What does the class Timer do? Answer in one sentence."
MAX_TOKENS = 64
CHUNK = 512  # tokens of the text that a step reads; the same for both runs, since it sets how sums are rounded
DEVICE_PAGES = 4
HOST_PAGES = 4
ROUTES = {
    "device_to_host": "pages, device to host",
    "host_to_disk": "pages, host to disk",
    "disk_to_host": "pages, disk to host",
    "host_to_device": "pages, host to device",
    "host_streamed": "layer slices, host to attention",
    "disk_streamed": "layer slices, disk to attention",
}


@dataclass(frozen=True)
class Answered:
    """An answer and how it came about."""

    tokens: list[tuple[int, TokenLogprobs | None]]
    bytes_moved: dict[str, int]  # see `EngineStats.bytes_moved`
    seconds: float
    page_bytes: int  # over all ranks


def run(console: Console, model: Path, tokenizer: Tokenizer, tensor_parallel_size: int) -> None:
    """Reads and answers twice and compares; raises DistKVError when the answers differ in a bit."""
    prompt = _prompt(tokenizer, ModelConfig.load(model).max_position_embeddings - MAX_TOKENS)
    resident = EngineConfig(
        model, tensor_parallel_size=tensor_parallel_size, max_model_len=len(prompt) + MAX_TOKENS, max_num_seqs=1,
        max_num_batched_tokens=CHUNK, host_kv_bytes=0,
    )  # fmt: skip
    num_pages = pages_for(len(prompt) + MAX_TOKENS, resident.page_size)
    console.print(
        f"\n[bold]> {TEXT} ... {QUESTION}[/bold]\n[dim]timeit of the standard library, {len(prompt)} tokens[/dim]"
    )
    console.print(f"\nwith its whole KV cache on the device, {num_pages} pages of {resident.page_size} tokens:")
    expected = _answer(console, resident, prompt)
    _show_answer(console, tokenizer, expected)

    console.print(f"with {DEVICE_PAGES} of these pages on the device at most, the others on the host and on disk:")
    with temporary_folder() as folder:
        window = replace(
            resident,
            device_kv_bytes=DEVICE_PAGES * expected.page_bytes,
            host_kv_bytes=HOST_PAGES * expected.page_bytes,
            disk_kv_bytes=(num_pages + 2 * MAX_DISK_WRITES) * expected.page_bytes,
            cache_dir=folder,
        )
        answered = _answer(console, window, prompt)
    _show_answer(console, tokenizer, answered)
    console.print(_moved_table(answered.bytes_moved))
    compare(answered.tokens, expected.tokens)
    console.print(
        f"[bold]{len(answered.tokens)} tokens and their logprobs: bit for bit the same as with everything resident."
        "[/bold]",
        soft_wrap=True,
    )


def compare(answer: list[tuple[int, TokenLogprobs | None]], resident: list[tuple[int, TokenLogprobs | None]]) -> None:
    """Raises DistKVError unless two answers have the same tokens and logprobs."""
    if answer != resident:
        raise DistKVError("the answer through the window is not that with everything resident; please report it")


def _prompt(tokenizer: Tokenizer, most_tokens: int) -> list[int]:
    """The text and the question about it; less of the text for a model that cannot read it all."""
    text = inspect.getsource(timeit)
    while True:
        content = f"{TEXT}\n\n{text}\n\n{QUESTION}"
        prompt = tokenizer.encode_chat([{"role": "user", "content": content}])
        if len(prompt) <= most_tokens:
            return prompt
        text = text[: len(text) * 3 // 4]


def _answer(console: Console, config: EngineConfig, prompt: list[int]) -> Answered:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=3)
    tokens: list[tuple[int, TokenLogprobs | None]] = []
    with closing(launch(config)) as engine:
        start = time.perf_counter()
        with _View(console, engine.info, len(prompt)) as view:
            for outputs in drive(engine, [EngineRequest("0", prompt, params, MAX_TOKENS, seed=0)]):
                tokens += [(output.token_id, output.logprobs) for output in outputs]
                if not any(output.finish_reason for output in outputs):  # at the end the pages are given back
                    view.show(engine.stats(), len(tokens))
        return Answered(tokens, engine.stats().bytes_moved, time.perf_counter() - start, engine.info.page_bytes)


class _View(LiveView):
    """How full the tiers are: live on a terminal, else a line for each quarter of the text and one at the end."""

    def __init__(self, console: Console, info: EngineInfo, prompt_len: int):
        super().__init__(console)
        self._info = info
        self._prompt_len = prompt_len
        self._quarters = 0
        self._last = ""

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._live is None and self._last:
            self._console.print(self._last)

    def show(self, stats: EngineStats, new_tokens: int) -> None:
        """Takes the state after a step."""
        info = self._info
        read = min(self._prompt_len, stats.pages_in_use * info.page_size)
        what = f"token {new_tokens} of the answer" if new_tokens else f"{read} of {self._prompt_len} tokens read"
        tiers = [
            ("device", stats.device_pages, info.num_pages),
            ("host", stats.host_pages, info.num_host_pages),
            ("disk", stats.disk_pages, info.num_disk_pages),
        ]
        if self._live is not None:
            bars = [f"  {name:6}  {'#' * used}{'.' * (size - used)}" for name, used, size in tiers if size]
            self._live.update(Text("\n".join([*bars, f"  {what}"])), refresh=True)
            return
        held = ", ".join(f"{name} {used} of {size}" for name, used, size in tiers if size)
        self._last = f"  {what}; pages: {held}"
        if not new_tokens and 4 * read // self._prompt_len > self._quarters:
            self._quarters = 4 * read // self._prompt_len
            self._console.print(self._last)


def _show_answer(console: Console, tokenizer: Tokenizer, answered: Answered) -> None:
    text = tokenizer.decode([token for token, _ in answered.tokens])
    console.print(f"  {text}", markup=False, soft_wrap=True)
    console.print(f"[dim]  {answered.seconds:.1f} s[/dim]\n")


def _moved_table(moved: dict[str, int]) -> Table:
    table = Table("moved", "MB")
    for route, title in ROUTES.items():
        if route in moved:
            table.add_row(title, f"{moved[route] / 1e6:.1f}")
    return table
