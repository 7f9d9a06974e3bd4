"""`distkv bench gpu`: what the whole engine reaches on this GPU, beside what the GPU gives at most in the same run.

Streaming from the host beside the link, and the device memory of contexts that differ sixteenfold; a whole model beside
the time that its weights take to be read once, and beside transformers; and whether log-probabilities are the same in
every bit wherever the context lies, without which the command fails. All on random weights.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from distkv.bench.device import LinkCeiling, MemoryCeiling, Turns
from distkv.bench.engine_rows import Shape, model_rows, residency_rows, streaming_rows
from distkv.bench.options import BenchOptions
from distkv.bench.parts import Measurement, measured_parts
from distkv.errors import CapacityError, ConfigError
from distkv.models.shapes import shape_folder
from distkv.reporting.tables import Column, target
from distkv.sampling_params import MAX_LOGPROBS
from distkv.storage.process_limits import available_bytes

PARTS = ("streaming", "model", "residency")
MODEL = "llama-3-8b"
PAGE_SIZE = 256
STEP_TOKENS = 2048

WINDOW = 2**16  # tokens that the device holds while a longer context streams
CONTEXTS = (WINDOW, 4 * WINDOW, 16 * WINDOW)
QUICK_WINDOW = 2**14
QUICK_CONTEXTS = (QUICK_WINDOW, 4 * QUICK_WINDOW)
MOST_LAYERS = 4  # a layer of the longest context is 4 GiB
HOST_SHARE = 0.5  # of the free host memory, for the longest context

RESIDENT_CONTEXT, COLD_CONTEXT = 1024, 16384

RESIDENCY_LAYERS = 4
RESIDENCY_CONTEXT, RESIDENCY_STEP = 6000, 512

STREAM_TARGET = 0.9  # of the copy from pinned memory
COLD_BYTES = 2**28  # in a step, from which on it is the link that a step waits for
FLAT = 0.01  # of the KV that is added: what a context's page table and states take
MODEL_TARGET = 1.25  # times reading the weights once

COLUMNS: dict[str, list[Column]] = {
    "streaming": [
        Column("context", "context"),
        Column("layers", "layers"),
        Column("ms per token", "ms_per_token", 1, ".2f"),
        Column("cold GB per step", "cold_bytes_per_step", 1e-9, ".2f"),
        Column("cold GB/s", "cold_bytes_per_s", 1e-9, ".1f"),
        Column("pinned copy GB/s", "link_bytes_per_s", 1e-9, ".1f"),
        Column("share", "share", 100, ".0f", " %"),
        Column("device MiB at most", "peak_device_bytes", 2**-20, ".1f"),
    ],
    "model": [
        Column("engine", "engine"),
        Column("context", "context"),
        Column("KV cache", "cache"),
        Column("ms per token", "ms_per_token", 1, ".2f"),
        Column("weights alone, ms", "weights_ms", 1, ".2f"),
        Column("cold KV alone, ms", "cold_ms", 1, ".2f"),
        Column("times the longer", "ratio", 1, ".2f", "x"),
    ],
    "residency": [
        Column("context lies", "cache"),
        Column("layers", "layers"),
        Column("tokens", "context"),
        Column("streamed MB", "streamed_bytes", 1e-6, ".1f"),
        Column("log-probabilities compared", "num_logprobs"),
        Column("the same", "same"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    window: int
    contexts: tuple[int, ...]
    layers: int | None  # of the model that streams; None for as many as the host has memory for
    new_tokens: int  # decoded at each context

    def __post_init__(self) -> None:
        if self.window < 2 * PAGE_SIZE:
            raise ConfigError(
                f"a window of {self.window} tokens is less than two pages of {PAGE_SIZE}; use {2 * PAGE_SIZE} or more"
            )

    @property
    def stream_step(self) -> int:
        """Tokens of a step of the streaming engine, whose pages fit into the window."""
        return min(STEP_TOKENS, self.window // 2)


def run(only: list[str], sizes: Sizes, options: BenchOptions) -> None:
    """Measures and prints tables; see `distkv bench gpu --help`.

    Raises ConfigError without a CUDA device or for a part that there is not; DistKVError when answers differ or a
    measurement fails, after all others are made.
    """
    facts = {"shape": MODEL, "page_size": PAGE_SIZE}
    with measured_parts("gpu", PARTS, COLUMNS, only, options, partial(_figures, sizes), **facts) as bench:
        for line in _notes(bench.rows):
            bench.line(line)


def fitting_layers(free_bytes: int, layer_bytes: int) -> int:
    """Layers of which the longest context, `layer_bytes` each, fits into the host's part of `free_bytes`."""
    layers = min(MOST_LAYERS, int(free_bytes * HOST_SHARE) // layer_bytes)
    if layers < 1:
        raise CapacityError(
            f"a layer of the longest context takes {layer_bytes} bytes of host memory, and at most {HOST_SHARE:.0%} of "
            f"the {free_bytes} that are free may be taken; free some, or leave the part out with --only"
        )
    return layers


def _figures(sizes: Sizes, part: str, turns: Turns) -> Iterator[Measurement]:
    device = turns.device.type
    with ExitStack() as stack:

        def shape(step_tokens: int, **changes: int) -> Shape:
            return Shape(stack.enter_context(shape_folder(MODEL, **changes)), PAGE_SIZE, step_tokens, device)

        if part == "streaming":
            layers = sizes.layers
            if layers is None:
                one_layer = shape(PAGE_SIZE, num_hidden_layers=1).spec.bytes_per_token
                layers = fitting_layers(available_bytes(), one_layer * max(sizes.contexts))
            link = stack.enter_context(closing(LinkCeiling(turns.device)))
            few = shape(sizes.stream_step, num_hidden_layers=layers)
            contexts = tuple(sorted(sizes.contexts))
            yield Measurement(
                f"contexts {', '.join(map(str, contexts))} over a window of {sizes.window}",
                lambda: streaming_rows(turns, link, few, sizes.window, contexts, sizes.new_tokens),
            )
        elif part == "model":
            link = stack.enter_context(closing(LinkCeiling(turns.device)))
            whole = shape(STEP_TOKENS)
            memory = MemoryCeiling(turns.device)
            yield Measurement(
                "the whole model",
                lambda: model_rows(turns, memory, link, whole, RESIDENT_CONTEXT, COLD_CONTEXT, sizes.new_tokens),
            )
        else:
            small = shape(RESIDENCY_STEP, num_hidden_layers=RESIDENCY_LAYERS, vocab_size=MAX_LOGPROBS)
            yield Measurement("equal bits", lambda: residency_rows(small, RESIDENCY_CONTEXT, sizes.new_tokens))


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures are, and whether they are what they should be."""
    parts = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    if streaming := parts["streaming"]:
        yield (
            "Streaming: the contexts are random keys and values. Cold bytes per second are those of a whole step; the "
            "ceiling is one large copy from pinned memory."
        )
        shares = [row["share"] for row in streaming if row["cold_bytes_per_step"] >= COLD_BYTES]
        if shares:
            least = min(shares)
            yield target(
                f"{COLD_BYTES // 2**20} MiB and more of cold bytes a step at {STREAM_TARGET:.0%} of that copy",
                f"{least:.0%}", least >= STREAM_TARGET,
            )  # fmt: skip
        first, last = streaming[0], streaming[-1]
        growth = last["peak_device_bytes"] - first["peak_device_bytes"]
        added = last["kv_bytes"] - first["kv_bytes"]
        if added:
            yield target(
                f"device memory flat, growing by less than {FLAT:.0%} of the KV",
                f"{growth / 2**20:.1f} MiB more for {added / 2**20:.0f} MiB of KV", growth < FLAT * added,
            )  # fmt: skip
    if model := parts["model"]:
        yield (
            "Model: weights alone are all weights but the embedding at the rate of a large read; cold KV alone is what "
            "a step brings from the host, at the rate of one large copy. transformers keeps its cache in DynamicCache, "
            "on the host with offloading=True. Prompts are read as usual, and not timed."
        )
        ours = next(row for row in model if row["engine"] == "distkv" and not row["cold_bytes_per_step"])
        yield target(
            f"a token on the device within {MODEL_TARGET:g}x of its weights",
            f"{ours['ratio']:.2f}x", ours["ratio"] <= MODEL_TARGET,
        )  # fmt: skip
    if parts["residency"]:
        yield "Residency: tokens and the log-probabilities of the whole vocabulary are the same in every bit."
