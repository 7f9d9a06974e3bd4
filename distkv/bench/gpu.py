"""`distkv bench gpu`: what the whole engine reaches on this GPU, beside what the GPU gives at most in the same run.

Streaming from the host beside the link, and the device memory of contexts that differ sixteenfold; a whole model beside
the time that its weights take to be read once, and beside transformers; and whether log-probabilities are the same in
every bit wherever the context lies, without which the command fails. All on random weights.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from distkv.bench.device import LinkCeiling, MemoryCeiling, Turns
from distkv.bench.engine_rows import Shape, model_rows, residency_rows, streaming_rows
from distkv.bench.parts import measure_parts
from distkv.errors import CapacityError
from distkv.models.shapes import shape_folder
from distkv.reporting.tables import Column, target
from distkv.sampling_params import MAX_LOGPROBS
from distkv.storage.process_limits import available_bytes

PARTS = ("streaming", "model", "residency")
MODEL = "llama-3-8b"
PAGE_SIZE = 256
REPEATS = 3

WINDOW = 2**16  # tokens that the device holds while a longer context streams
CONTEXTS = (WINDOW, 4 * WINDOW, 16 * WINDOW)
STREAM_TOKENS = 24  # decoded at each context
MOST_LAYERS = 4  # with which making the random contexts takes minutes; a layer of the longest one is 4 GiB
HOST_SHARE = 0.5  # of the free host memory, for the longest context

RESIDENT_CONTEXT, COLD_CONTEXT = 1024, 16384
MODEL_TOKENS = 64

RESIDENCY_LAYERS = 4
RESIDENCY_CONTEXT, RESIDENCY_TOKENS, RESIDENCY_STEP = 6000, 32, 512

STREAM_TARGET = 0.9  # of the copy from pinned memory
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


def run(only: list[str], json_file: Path | None) -> None:
    """Measures and prints tables; see `distkv bench gpu --help`.

    Raises ConfigError without a CUDA device or for a part that there is not, DistKVError when answers differ.
    """
    facts = {"benchmark": "gpu", "shape": MODEL, "page_size": PAGE_SIZE, "repeats": REPEATS}
    console, rows = measure_parts(facts, PARTS, COLUMNS, only, json_file, _rows)
    for line in _notes(rows):
        console.print(line, soft_wrap=True)


def fitting_layers(free_bytes: int, layer_bytes: int) -> int:
    """Layers of which the longest context, `layer_bytes` each, fits into the host's part of `free_bytes`."""
    layers = min(MOST_LAYERS, int(free_bytes * HOST_SHARE) // layer_bytes)
    if layers < 1:
        raise CapacityError(
            f"a layer of the longest context takes {layer_bytes} bytes of host memory, and at most {HOST_SHARE:.0%} of "
            f"the {free_bytes} that are free may be taken; free some, or leave the part out with --only"
        )
    return layers


def _rows(part: str, turns: Turns) -> Iterator[dict[str, Any]]:
    device = turns.device.type
    with ExitStack() as stack:

        def shape(step_tokens: int, **changes: int) -> Shape:
            return Shape(stack.enter_context(shape_folder(MODEL, **changes)), PAGE_SIZE, step_tokens, device)

        if part == "streaming":
            one_layer = shape(PAGE_SIZE, num_hidden_layers=1).spec.bytes_per_token
            layers = fitting_layers(available_bytes(), one_layer * max(CONTEXTS))
            link = stack.enter_context(closing(LinkCeiling(turns.device)))
            small = shape(PAGE_SIZE, num_hidden_layers=layers)
            yield from streaming_rows(turns, link, small, WINDOW, CONTEXTS, STREAM_TOKENS)
        elif part == "model":
            link = stack.enter_context(closing(LinkCeiling(turns.device)))
            whole = shape(2048)
            memory = MemoryCeiling(turns.device)
            yield from model_rows(turns, memory, link, whole, RESIDENT_CONTEXT, COLD_CONTEXT, MODEL_TOKENS)
        else:
            small = shape(RESIDENCY_STEP, num_hidden_layers=RESIDENCY_LAYERS, vocab_size=MAX_LOGPROBS)
            yield from residency_rows(small, RESIDENCY_CONTEXT, RESIDENCY_TOKENS)


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures are, and whether they are what they should be."""
    parts = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    if streaming := parts["streaming"]:
        yield (
            "Streaming: the contexts are random keys and values. Cold bytes per second are those of a whole step; the "
            "ceiling is one large copy from pinned memory."
        )
        least = min(row["share"] for row in streaming if row["share"] is not None)
        yield target(f"cold bytes at {STREAM_TARGET:.0%} of that copy", f"{least:.0%}", least >= STREAM_TARGET)
        first, last = streaming[0], streaming[-1]
        growth = last["peak_device_bytes"] - first["peak_device_bytes"]
        added = last["kv_bytes"] - first["kv_bytes"]
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
        ratio = model[0]["ratio"]
        yield target(
            f"a token on the device within {MODEL_TARGET:g}x of its weights", f"{ratio:.2f}x", ratio <= MODEL_TARGET
        )
    if parts["residency"]:
        yield "Residency: tokens and the log-probabilities of the whole vocabulary are the same in every bit."
