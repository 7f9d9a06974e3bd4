"""Attention of a step on CUDA over pages that the ranks of a context group share out, by the kernels of `cuda.py`.

Few new tokens go where the pages lie: queries of the group's ranks are gathered, each rank computes the states of its
own pages for all of them, and each gets those of its own query heads and merges them in logical order. For many new
tokens pages are exchanged, some at a time, and each rank attends by its own query heads. See `context_attention.py`,
which does the same on a CPU. Nothing here waits for the device, where what carries the exchanges does not.

Dims: T tokens of the step, H query heads of this rank, D ranks of the group, K KV heads of the group, C new tokens of
each sequence.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.cuda.merge import STATES, carry_like, merge_splits
from distkv.kernels.cuda.prefill import SEGMENT_TOKENS
from distkv.kernels.cuda.softmax import States
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import check_context_page_size
from distkv.workers.attention.context_attention import PAGE_BYTES, ContextGroup
from distkv.workers.attention.cuda import (
    CudaShape,
    PrefillArrays,
    Walk,
    go_through,
    is_decoded,
    meet_blocks,
    meet_splits,
    new_states,
)
from distkv.workers.attention.cuda_context_plan import (
    ContextDecode,
    ContextPrefill,
    ContextRoundArrays,
    PiecePages,
    grid_of_ranks,
    plan_context_decode,
    plan_context_prefill,
)
from distkv.workers.attention.decode_plan import plan_decode
from distkv.workers.attention.step_loads import Member, plan_loads
from distkv.workers.errors import ConfigError
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import Array
from distkv.workers.sizes import STATE_BYTES

# Device memory that exchanges take beside their results: pages as they are given, as they come and as a pool, of both
# kinds, and states likewise.
EXCHANGE_BYTES = 6 * PAGE_BYTES + 3 * STATE_BYTES


@dataclass(frozen=True)
class ContextShape:
    """What of a rank of a context group decides how attention is cut up."""

    context: ContextGroup
    whole: CudaShape  # with the query heads and the KV heads of the group
    piece_pages: int  # of the leader, that are exchanged at a time at most

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        first, last = self.context.query_heads[self.context.group.rank]
        return last - first

    @property
    def num_kv_heads(self) -> int:
        """Those of this rank's query heads."""
        first, last = self.context.kv_heads[self.context.group.rank]
        return last - first


def context_shape(context: ContextGroup, whole: CudaShape, spec: PageSpec) -> ContextShape:
    """That of a rank with pages of `spec`. Raises ConfigError for pages that are less than a split of decode, which
    several ranks would have then, and for query heads that kernels cannot take together."""
    check_context_page_size(spec.page_size, context.group.size)
    for (first, last), (first_kv, last_kv) in zip(context.query_heads, context.kv_heads, strict=True):
        num_kv_heads = last_kv - first_kv
        if num_kv_heads > 1 and (first, last) != (first_kv * whole.group_size, last_kv * whole.group_size):
            raise ConfigError(
                f"a rank of a context group would have query heads {first} to {last} of the group's, which are part of "
                f"{num_kv_heads} KV heads, and the kernels of CUDA take whole KV heads or parts of one; use another "
                "tensor_parallel_size"
            )
    return ContextShape(context, whole, context.pages_at_a_time(spec))


@dataclass(frozen=True)
class ContextArrays(Generic[Array]):
    """What the kernels of a step read; all int64."""

    few_rows: Array  # of the step, of all that decode
    tables: list[Array]  # by group of sequences
    rounds: list[list[ContextRoundArrays[Array]]]
    prefill: PrefillArrays[Array] | None  # of whose `filled` this rank has its own
    pieces: list[PiecePages[Array]]
    filled: Array  # with a codec: slots of this rank's pages that decode fills, or -1


@dataclass(frozen=True)
class CudaContextPlan:
    """The attention of a step, planned on the host."""

    decode: list[ContextDecode]
    prefill: ContextPrefill | None
    few_rows: np.ndarray
    filled: np.ndarray
    loads: list[Load]

    @property
    def arrays(self) -> ContextArrays[np.ndarray]:
        """What the kernels read."""
        prefill, pieces = None, []
        if self.prefill is not None:
            plan, pieces = self.prefill.plan, self.prefill.pieces
            prefill = PrefillArrays(plan.table, plan.chunks, plan.blocks, self.prefill.filled)
        tables = [group.table for group in self.decode]
        rounds = [[one.arrays for one in group.rounds] for group in self.decode]
        return ContextArrays(self.few_rows, tables, rounds, prefill, pieces, self.filled)


def plan_cuda_context(steps: list[SequenceStep], shape: ContextShape, num_padding: int = 0) -> CudaContextPlan:
    """Plans the attention of a step for a rank; see `plan_cuda_attention`."""
    whole, group = shape.whole, shape.context.group
    page_size, rank, size = whole.page_size, group.rank, group.size
    decode: dict[int, list[Member]] = defaultdict(list)
    prefill: list[Member] = []
    filled, few_rows = [], []
    first = 0
    for step in steps:
        count, decodes = len(step.token_ids), is_decoded(step, whole)
        (decode[count] if decodes else prefill).append((first, step))
        if decodes:
            few_rows.append(np.arange(first, first + count))
            page = step.start // page_size
            if whole.codec is not None and (step.start + count) % page_size == 0 and page % size == rank:
                filled.append(step.pages[page // size])
        first += count
    tile = STATES * size  # so that rounds end between pages of the leader
    most = {count: max(tile, whole.max_states(count, len(decode))) for count in decode}
    members = [member for group in decode.values() for member in group] + prefill
    together = [(count, most[count] // tile) for count, group in decode.items() for _ in group]
    together += [(0, len(members))] * len(prefill)
    cell_pages = max(1, SEGMENT_TOKENS // (page_size * size))
    brought = plan_loads(members, together, page_size * size, cell_pages, whole.buffer_pages)
    grid = grid_of_ranks(brought, members, page_size, size)
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *few_rows])
    groups, number = [], 0
    for count, these in decode.items():
        plan = plan_decode(count, these, number, grid, page_size, most[count], tile, num_padding)
        groups.append(plan_context_decode(plan, rows, rank, size))
        number += len(these)
    chunks = None
    if prefill:
        chunks = plan_context_prefill(
            prefill, number, brought, grid, page_size, rank, size, shape.num_heads // shape.num_kv_heads,
            shape.piece_pages, whole.codec is not None,
        )  # fmt: skip
    return CudaContextPlan(groups, chunks, rows, np.array(filled, dtype=np.int64), brought.loads)


@dataclass(frozen=True)
class CudaContextAttention:
    """An `Attention`, see `batch.py`: a plan and its arrays on the device."""

    plan: CudaContextPlan
    shape: ContextShape
    arrays: ContextArrays[Tensor]

    @property
    def loads(self) -> list[Load]:
        """See `Attention`; of this rank's pages."""
        return self.plan.loads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention` and `CudaAttention.attend`; of this rank's query heads. The pool has the KV heads of the
        group. All ranks go through their walks in the same order, so that their exchanges meet."""
        out, codec = q.new_empty(q.shape), self.shape.whole.codec
        walks: list[Walk] = []
        if self.plan.decode:
            few = self.shape.context.gather_queries(q[self.arrays.few_rows])
            walks += [
                self._decode(plan, table, rounds, few, layer_pool, out)
                for plan, table, rounds in zip(self.plan.decode, self.arrays.tables, self.arrays.rounds, strict=True)
            ]
        if self.plan.prefill is not None and self.arrays.prefill is not None:
            walks.append(self._prefill(self.plan.prefill, self.arrays.prefill, q, layer_pool, out))
        go_through(walks, len(self.loads), stream)
        if codec is not None:
            codec.round(layer_pool, self.arrays.filled)
        return out.flatten(1)

    def _decode(
        self, plan: ContextDecode, table: Tensor, rounds: list[ContextRoundArrays[Tensor]], few: Tensor,
        layer_pool: Tensor, out: Tensor,
    ) -> Walk:  # fmt: skip
        whole, count = self.shape.whole, plan.num_tokens
        carry = carry_like(out) if len(plan.rounds) > 1 else None
        for one, read in zip(plan.rounds, rounds, strict=True):
            rows = one.own.num_states, whole.num_kv_heads, count * whole.group_size
            states = new_states(few, rows, whole.head_dim)
            yield from meet_splits(whole, few, layer_pool, table, one.own, read.own, count, states)
            states = self._exchange(read, states, count)
            merge_splits(states, read.sequences, out, carry, num_tokens=count, split_tokens=whole.page_size)

    def _exchange(self, read: ContextRoundArrays[Tensor], states: States, count: int) -> States:
        """All states of a round, `[states, H, C]`: a KV head for each query head of this rank."""
        dim, own = states.acc.shape[-1], self.shape.num_heads
        wide = torch.cat(
            [states.acc[read.given], states.m[read.given, ..., None], states.total[read.given, ..., None]], 3
        )
        wide = wide.unflatten(2, (count, -1)).transpose(2, 3).flatten(1, 2)  # [given, H of the group, C, dim + 2]
        found = wide.new_empty(self.shape.context.group.size, len(wide), own, count, dim + 2)
        self.shape.context.exchange_queries(wide, found)
        acc, m, total = found.flatten(0, 1)[read.found].split([dim, 1, 1], dim=3)
        return States(acc.contiguous(), m.squeeze(3).contiguous(), total.squeeze(3).contiguous())

    def _prefill(
        self, plan: ContextPrefill, arrays: PrefillArrays[Tensor], q: Tensor, layer_pool: Tensor, out: Tensor
    ) -> Walk:
        shape, whole, context, exact = self.shape, self.shape.whole, self.shape.context, None
        if whole.codec is not None and plan.most_filled:
            exact = layer_pool.new_empty(plan.most_filled, *layer_pool[:, 0].shape)
            whole.codec.round(layer_pool, arrays.filled, exact)
            exact = context.exchange_buffer(exact)
        saved = plan.plan.num_saved
        state = new_states(q, (saved, shape.num_heads), whole.head_dim) if saved else None
        # for what has no page on the device; tiles reach beyond the last token
        nothing = layer_pool.new_zeros(2, 1, shape.num_kv_heads, *layer_pool.shape[3:])
        buffer, load, first = None, -1, 0
        for index, size in zip(plan.plan.loads, plan.plan.num_blocks[1:], strict=True):
            if plan.loads[index] != load:
                load = plan.loads[index]
                buffer = yield load
            piece = self.arrays.pieces[index]
            pool, cold = nothing, None
            if len(piece.slots):
                pool = context.exchange_pool(layer_pool, piece.slots)
            if len(piece.indexes):
                assert buffer is not None
                cold = context.exchange_buffer(buffer[piece.indexes])
            meet_blocks(whole, q, pool, cold, arrays, slice(first, first + size), state, out, exact)
            first += size
