"""CUDA graphs of decode steps whose pages are all resident: one launch instead of a dozen for each layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import torch
from torch import Tensor

from distkv.storage.pools.device_pool import DevicePool
from distkv.workers.attention.cuda import (
    AttentionArrays,
    CudaAttention,
    CudaPlan,
    CudaShape,
    DecodeArrays,
    RoundArrays,
)
from distkv.workers.attention.decode_plan import DecodePlan, DecodeRound, split_pages_for
from distkv.workers.runners.batch import Batch, Tokens
from distkv.workers.runners.host_copies import Array, lay_out, pack
from distkv.workers.sampling.placeholders import resolve_placeholders

if TYPE_CHECKING:
    from distkv.workers.model.llama import LlamaModel

# Splits and pages of a graph's step, over those that the device has: sequences that share pages have more.
SHARING = 2


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


@dataclass(frozen=True)
class Inputs(Generic[Array]):
    """What changes from one step of a graph to the next, in the order in which it lies on the device."""

    token_ids: Array  # [rows], this and the next four as in `Tokens`
    positions: Array
    context: Array
    page: Array
    offset: Array
    filled: Array  # with a codec: [rows], see `AttentionArrays`
    sequences: Array  # [rows, 6], this and the next two as in `RoundArrays`
    num_items: Array  # [1, 2]
    items: Array  # [splits, 2]
    table: Array  # [entries], see `DecodeArrays`


class StepGraphs:
    """A graph for each size of a step of single tokens, all with the same memory for inputs and workspace."""

    def __init__(self, model: "LlamaModel", pool: DevicePool, shape: CudaShape, max_rows: int):
        self._model, self._pool, self._shape = model, pool, shape
        self._num_splits = graph_splits(pool.num_pages, max_rows, shape)
        self._num_entries = SHARING * pool.num_pages + max_rows
        columns = [(max_rows,)] * 5
        filled = max_rows if shape.codec is not None else 0
        shapes = [*columns, (filled,), (max_rows, 6), (1, 2), (self._num_splits, 2), (self._num_entries,)]
        spans, size = lay_out(map(math.prod, shapes))
        self._spans = Inputs(*spans)
        self._flat = torch.zeros(size, dtype=torch.int64, device=pool.data.device)
        self._inputs = Inputs(*(self._flat[span].view(one) for span, one in zip(spans, shapes, strict=True)))
        self._inputs.page.fill_(-1)
        self._inputs.filled.fill_(-1)
        blank = model.blank_input(max_rows)
        self._x_TE = None if blank is None else blank()
        # a graph holds the addresses of what it reads, so all of that must live as long
        self._logit_rows = torch.arange(max_rows, device=self._flat.device)
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, Callable[[], Tensor]] = {}

    def capture(self, rows: int) -> None:
        """Records the graph of steps with `rows` rows; the inputs hold padding."""
        batch = self._batch(rows)
        x_TE = None if self._x_TE is None else self._x_TE[:rows]
        self._graphs[rows] = captured(lambda: self._model.forward(batch, self._pool, None, x_TE), self._memory)

    def fits(self, rows: int | None, plan: CudaPlan) -> bool:
        """Whether a step of `rows` rows can run as a graph."""
        if rows not in self._graphs or plan.prefill is not None or plan.left is not None or len(plan.decode) != 1:
            return False
        group = plan.decode[0]
        one = group.rounds[0]
        fits = len(one.items) <= self._num_splits and len(group.table) <= self._num_entries
        return fits and len(group.rounds) == 1 and not one.loads

    def run(
        self,
        rows: int,
        tokens: Tokens[np.ndarray],
        attention: AttentionArrays[np.ndarray],
        sampled: Tensor | None,
        x_TE: Tensor | None = None,
    ) -> Tensor:
        """The hidden states `[rows, E]` of a step that fits; they hold until the next one runs.

        Args:
            sampled, x_TE: see `Runner`; the latter has all rows.
        """
        [group] = attention.decode
        [one] = group.rounds
        arrays = [tokens.token_ids, tokens.positions, tokens.context, tokens.page, tokens.offset]
        filled = np.full(rows if self._shape.codec is not None else 0, -1)
        filled[: len(attention.filled)] = attention.filled
        arrays += [filled, one.sequences, one.num_items, one.items]
        *spans, _ = vars(self._spans).values()
        end = self._spans.items.start + one.items.size
        block = self._pool.device.host_block(end + len(group.table))
        pack(arrays, spans, block)
        block[end:].numpy()[:] = group.table
        self._flat[:end].copy_(block[:end], non_blocking=True)
        self._inputs.table[: len(group.table)].copy_(block[end:], non_blocking=True)
        if self._x_TE is None:
            token_ids = self._inputs.token_ids[:rows]
            token_ids.copy_(resolve_placeholders(token_ids, sampled))
        else:
            assert x_TE is not None
            self._x_TE[:rows].copy_(x_TE)
        return self._graphs[rows]()

    def _batch(self, rows: int) -> Batch:
        inputs, capacity = self._inputs, self._num_splits
        columns = inputs.token_ids, inputs.positions, inputs.context, inputs.page, inputs.offset, self._logit_rows
        tokens = Tokens(*(column[:rows] for column in columns))
        one = RoundArrays(inputs.sequences[:rows], inputs.items, inputs.num_items)
        nothing = np.zeros((0, 2), dtype=np.int64)
        plan = CudaPlan(
            [DecodePlan(1, nothing, [DecodeRound(nothing, nothing, [capacity], [], capacity)])], None, nothing, []
        )
        arrays = AttentionArrays([DecodeArrays(inputs.table, [one])], None, inputs.filled[:rows])
        return Batch(tokens, CudaAttention(plan, self._shape, arrays))
