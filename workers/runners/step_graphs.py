"""CUDA graphs of decode steps whose pages are all resident: one launch instead of a dozen for each layer."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distkv.storage.pools.device_pool import DevicePool
from distkv.workers.attention.cuda import CudaAttention, CudaPlan, CudaShape
from distkv.workers.attention.decode_plan import DecodePlan, DecodeRound, split_pages_for
from distkv.workers.runners.batch import FIELDS, Batch
from distkv.workers.runners.host_copies import lay_out, pack
from distkv.workers.sampling.placeholders import resolve_placeholders

if TYPE_CHECKING:
    from distkv.workers.model.llama import LlamaModel

# Splits and pages of a graph's step, over those that the device has: sequences that share pages have more.
SHARING = 2
COLUMNS = FIELDS[:-1]


def graph_splits(num_pages: int, max_rows: int, shape: CudaShape) -> int:
    """Most splits of a graph's step over a pool of `num_pages`."""
    return min(shape.max_states(1), SHARING * num_pages // split_pages_for(shape.page_size) + max_rows)


def captured(run: Callable[[], Tensor], memory: Any) -> Callable[[], Tensor]:
    """A function that replays what `run` launches, and returns the same tensor each time; what `run` reads must live as
    long. `memory` is of `torch.cuda.graph_pool_handle`."""
    run()  # compiles, and has libraries take their workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class StepGraphs:
    """A graph for each size of a step of single tokens, all with the same memory for inputs and workspace."""

    def __init__(self, model: "LlamaModel", pool: DevicePool, shape: CudaShape, max_rows: int):
        self._model, self._pool, self._shape = model, pool, shape
        self._num_splits = graph_splits(pool.num_pages, max_rows, shape)
        self._num_entries = SHARING * pool.num_pages + max_rows
        names = {name: (max_rows,) for name in COLUMNS}
        shapes: dict[str, tuple[int, ...]] = names | {
            "sequences": (max_rows, 6),
            "num_items": (1, 2),
            "items": (self._num_splits, 2),
            "table": (self._num_entries,),
        }
        self._spans, size = lay_out({name: math.prod(one) for name, one in shapes.items()})
        self._flat = torch.zeros(size, dtype=torch.int64, device=pool.data.device)
        self._inputs = {name: self._flat[self._spans[name]].view(one) for name, one in shapes.items()}
        self._inputs["page"].fill_(-1)
        # a graph holds the addresses of what it reads, so all of that must live as long
        self._logit_rows = torch.arange(max_rows, device=self._flat.device)
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, Callable[[], Tensor]] = {}

    def capture(self, rows: int) -> None:
        """Records the graph of steps with `rows` rows; the inputs hold padding."""
        batch = self._batch(rows)
        self._graphs[rows] = captured(lambda: self._model.forward(batch, self._pool, None), self._memory)

    def fits(self, rows: int | None, plan: CudaPlan) -> bool:
        """Whether a step of `rows` rows can run as a graph."""
        if rows not in self._graphs or plan.prefill is not None or len(plan.decode) != 1:
            return False
        group = plan.decode[0]
        one = group.rounds[0]
        fits = len(one.items) <= self._num_splits and len(group.table) <= self._num_entries
        return fits and len(group.rounds) == 1 and not one.loads

    def run(self, rows: int, arrays: dict[str, np.ndarray], sampled: Tensor | None) -> Tensor:
        """The hidden states `[rows, E]` of a step that fits; they hold until the next one runs."""
        named = {name: arrays[name] for name in COLUMNS}
        named |= {name: arrays[f"0.0.{name}"] for name in ("sequences", "num_items", "items")}
        table, end = arrays["0.table"], self._spans["items"].start + named["items"].size
        block = torch.empty(end + len(table), dtype=torch.int64, pin_memory=self._flat.is_cuda)
        pack(named, self._spans, block)
        block[end:].numpy()[:] = table
        self._flat[:end].copy_(block[:end], non_blocking=True)
        self._inputs["table"][: len(table)].copy_(block[end:], non_blocking=True)
        token_ids = self._inputs["token_ids"][:rows]
        token_ids.copy_(resolve_placeholders(token_ids, sampled))
        return self._graphs[rows]()

    def _batch(self, rows: int) -> Batch:
        inputs, capacity = self._inputs, self._num_splits
        arrays = {name: inputs[name][:rows] for name in COLUMNS}
        arrays["logit_rows"] = self._logit_rows[:rows]
        arrays |= {
            "0.table": inputs["table"], "0.0.sequences": inputs["sequences"][:rows], "0.0.items": inputs["items"],
            "0.0.num_items": inputs["num_items"],
        }  # fmt: skip
        nothing = np.zeros((0, 2), dtype=np.int64)
        plan = CudaPlan([DecodePlan(1, nothing, [DecodeRound(nothing, nothing, [capacity], [], capacity)])], None)
        return Batch.of(arrays, CudaAttention(plan, self._shape, arrays))
