"""Attention of a step over pages that the ranks of a context group share out, by the native kernels of a CPU.

Few new tokens go where the pages lie: the queries of the group's ranks are gathered, each rank computes the states of
its own pages, and each gets those of its own query heads from all of them and merges them in logical order. For many
new tokens pages are fewer bytes than queries and states: these are exchanged, some at a time, and each rank attends by
its own query heads. Both give the bits of one rank that has all the pages.

Dims: T tokens of the step, H query heads of this rank, D ranks of the group, K KV heads of the group.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import Library
from distkv.kernels.native.page_states import merge_page_states, page_states, state_width
from distkv.kernels.native.paged_attention import CodedPages, attend_pages, kept_states
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier
from distkv.workers.attention.context_plan import ContextPlan, Limits, PageRound, StateRound, plan_context
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard
from distkv.workers.page_directory import SequenceStep

STATE_BYTES = 8 << 20  # of states that a rank gives at a time, and about as many it gets
PAGE_BYTES = 32 << 20  # of pages that it gets, of one layer


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share out the pages of some KV heads, as one of them sees them."""

    group: ProcessGroup
    # of each rank its query heads, and the KV heads of these, half-open and counted from the group's first ones
    query_heads: list[tuple[int, int]]
    kv_heads: list[tuple[int, int]]

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, rank: int, group: ProcessGroup) -> Self:
        """That of a rank of a layout."""
        shards = [Shard.of(model, layout, one) for one in layout.context_group(rank)]
        first, size = shards[0].query_heads[0], model.group_size
        query_heads = [(one.query_heads[0] - first, one.query_heads[1] - first) for one in shards]
        return cls(group, query_heads, [(start // size, -(-end // size)) for start, end in query_heads])

    @property
    def num_query_heads(self) -> int:
        """Of all ranks."""
        return self.query_heads[-1][1]

    def gather_queries(self, q: Tensor) -> Tensor:
        """The queries `[T, query heads of the group, head_dim]` of those `[T, H, head_dim]` of each rank."""
        widths = [last - first for first, last in self.query_heads]
        padded = q.new_zeros(len(q), max(widths), q.shape[2])
        padded[:, : q.shape[1]] = q
        parts = self.group.all_gather(padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def exchange_queries(self, x: Tensor, out: Tensor) -> None:
        """Of x `[rows, query heads of the group, ...]` of each rank, this one's heads: into out `[D, rows, H, ...]`."""
        self._exchange(x, 1, self.query_heads, out)

    def exchange_pages(self, x: Tensor) -> Tensor:
        """Of x `[a, b, K, ...]` of each rank, the heads that this one attends to: `[D, a, b, heads, ...]`."""
        first, last = self.kv_heads[self.group.rank]
        out = x.new_empty(self.group.size, *x.shape[:2], last - first, *x.shape[3:])
        self._exchange(x, 2, self.kv_heads, out)
        return out

    def exchange_pool(self, layer_pool: Tensor, slots: Tensor) -> Tensor:
        """The pages of each rank in some slots of its pool `[2, pages, K, S, head_dim]`, by the heads that this one
        attends to, as a pool: those of the first rank, then those of the next one."""
        return self.exchange_pages(layer_pool[:, slots]).transpose(0, 1).flatten(1, 2).contiguous()

    def exchange_buffer(self, pages: Tensor) -> Tensor:
        """Of pages `[n, 2, K, ...]` of each rank the heads that this one attends to, `[D * n, 2, heads, ...]`."""
        return self.exchange_pages(pages).flatten(0, 1)

    def pages_at_a_time(self, spec: PageSpec) -> int:
        """How many pages of `spec` each rank gives at a time at most, so that none gets more than PAGE_BYTES."""
        heads = max(last - first for first, last in self.kv_heads)
        page_bytes = self.group.size * heads * (spec.slice_bytes_in(Tier.DEVICE) // spec.num_kv_heads)
        return max(1, PAGE_BYTES // page_bytes)

    def _exchange(self, x: Tensor, dim: int, heads: list[tuple[int, int]], out: Tensor) -> None:
        parts = [x.narrow(dim, first, last - first).flatten() for first, last in heads]
        self.group.exchange(torch.cat(parts), [len(part) for part in parts], out.view(self.group.size, -1))


@dataclass(frozen=True)
class ContextAttention:
    """An `Attention`, see `batch.py`."""

    library: Library
    plan: ContextPlan
    context: ContextGroup
    codec: NativeCodec | None  # of full pages

    @property
    def loads(self) -> list[Load]:
        """See `Attention`; of this rank's pages."""
        return self.plan.loads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`; of this rank's query heads. The pool has the KV heads of the group."""
        plan = self.plan
        tokens, heads, dim = q.shape
        out = q.new_empty(tokens, heads * dim)
        coded, all_coded = None, None
        if self.codec is not None:
            exact = layer_pool.new_empty(plan.most_filled, *layer_pool[:, 0].shape)
            self.codec.round(layer_pool, plan.filled, exact[: len(plan.filled)])
            coded = CodedPages(self.codec.format, exact)
            if plan.num_page_rounds:
                all_coded = CodedPages(self.codec.format, self.context.exchange_buffer(exact))
        kept = kept_states(tokens, heads, dim) if plan.num_page_rounds > 1 else None
        few = self.context.gather_queries(q[plan.few_rows]) if len(plan.few_rows) else q[:0]
        states = torch.empty(self._most_states(), heads, state_width(dim), dtype=torch.float32, device="cpu")
        for index, (of_states, of_pages) in enumerate(plan.rounds):
            buffer = None
            if index < len(plan.loads):
                assert stream is not None
                buffer = stream.take()
            for one in of_states:
                self._meet_states(one, few, layer_pool, buffer, coded, states, out)
            for each in of_pages:
                self._meet_pages(each, q, layer_pool, buffer, all_coded, kept, out)
        return out

    def _most_states(self) -> int:
        """Rows of states that this rank holds at a time: those that are carried on, and what the ranks give."""
        most = max((one.num_rows for of_states, _ in self.plan.rounds for one in of_states), default=0)
        return len(self.plan.few_rows) + self.context.group.size * most

    def _meet_states(
        self, one: StateRound, few: Tensor, layer_pool: Tensor, buffer: Tensor | None, coded: CodedPages | None,
        states: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        given = states.new_empty(one.num_rows, *few.shape[1:2], states.shape[2])
        page_states(self.library, few, layer_pool, buffer, one.items, given, coded)
        first = len(self.plan.few_rows)
        self.context.exchange_queries(given, states[first : first + self.context.group.size * one.num_rows])
        merge_page_states(self.library, states, one.order, one.offsets, out, one.targets)

    def _meet_pages(
        self, one: PageRound, q: Tensor, layer_pool: Tensor, buffer: Tensor | None, coded: CodedPages | None,
        kept: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        pool = self.context.exchange_pool(layer_pool, one.slots)
        cold = None
        if len(one.indexes):
            assert buffer is not None
            cold = self.context.exchange_buffer(buffer[one.indexes])
        attend_pages(self.library, q, pool, cold, self.plan.table, one.chunks, kept, out, coded)


def plan_context_attention(
    library: Library,
    steps: list[SequenceStep],
    spec: PageSpec,
    context: ContextGroup,
    buffer_pages: int,
    codec: NativeCodec | None = None,
) -> ContextAttention:
    """The attention of a step for a rank with pages of `spec`, `buffer_pages` of them in a buffer of its ring."""
    group, row_bytes = context.group, 4 * context.num_query_heads * state_width(spec.head_dim)
    limits = Limits(max(1, STATE_BYTES // row_bytes), context.pages_at_a_time(spec))
    plan = plan_context(steps, spec.page_size, group.rank, group.size, buffer_pages, limits, codec is not None)
    return ContextAttention(library, plan, context, codec)
