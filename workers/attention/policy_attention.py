"""Attention of a step in which some tokens choose their pages, by the native kernels of a CPU.

A page of one KV head is to these kernels a page of a model that has but one: the pool `[2, slots, K, S, D]` is viewed
as `[2, slots * K, 1, S, D]`, and each token's query heads of a KV head are a token of their own. So each of these meets
the pages that it has chosen in logical order, by the arithmetic of any other: one that chooses all of them has the
bits of full attention.

Tokens of prompts attend to everything, as they do without a policy; the last of them may be observed, see `turns.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.expected_weights import expected_weights
from distkv.kernels.native.library import Library
from distkv.kernels.native.paged_attention import CodedPages
from distkv.storage.meter import Meter
from distkv.storage.moving.slices_on_demand import SlicesOnDemand
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.pools.page_summaries import PageSummaries
from distkv.workers.attention.chosen_attention import Bring, attend_and_weigh, attend_chosen, covered, total_weights
from distkv.workers.attention.chosen_pages import ChosenCalls, plan_chosen
from distkv.workers.attention.filled_pages import FilledPages, plan_filled
from distkv.workers.attention.native import NativeAttention, plan_native_attention
from distkv.workers.attention.policies.policy import (
    Choice,
    Memory,
    PagePolicy,
    RowPolicy,
    Rows,
    SequentialPolicy,
    num_observed,
)
from distkv.workers.attention.summarising import Summarising
from distkv.workers.attention.turns import Choosers, Turn, plan_turns
from distkv.workers.page_directory import SequenceStep


@dataclass(frozen=True)
class Tools:
    """What attention by a policy needs of a rank."""

    library: Library
    policy: PagePolicy
    summaries: PageSummaries | None  # needed where the policy chooses by them
    page_size: int
    num_kv_heads: int
    num_layers: int
    meter: Meter
    codec: NativeCodec | None = None  # of full pages
    audit: int | None = None  # of how many steps in which tokens choose one is audited
    num_steps: Iterator[int] = field(default_factory=count)  # in which tokens choose

    def audits(self) -> bool:
        """Whether the next of these steps is audited; to be asked once for each."""
        return self.audit is not None and next(self.num_steps) % self.audit == 0

    def new_memories(self) -> list[Memory]:
        """What a policy that remembers has of a sequence, by layer, before it has observed a row."""
        assert isinstance(self.policy, SequentialPolicy)
        return [self.policy.begin(self.num_kv_heads) for _ in range(self.num_layers)]


class PolicyAttention:
    """An `Attention`, see `batch.py`, whose stream is a `SlicesOnDemand`."""

    def __init__(
        self, tools: Tools, full: NativeAttention | None, full_rows: np.ndarray, turns: list[Turn],
        choosing_rows: np.ndarray, summarising: Summarising | None, filled: FilledPages | None,
    ):  # fmt: skip
        """
        Args:
            full: the attention of all rows that do not choose, if there are any.
            full_rows, choosing_rows: which rows of the step attend how, in the order of `full` and of `turns`.
            filled: needed where there is a codec and some rows choose.
        """
        self._tools, self._full, self._turns, self._summarising = tools, full, turns, summarising
        self._full_rows, self._choosing_rows, self._filled = full_rows, choosing_rows, filled
        self._is_audited = not all(turn.observed for turn in turns) and tools.audits()
        self._row_policy = tools.policy if isinstance(tools.policy, RowPolicy) else None  # else it remembers
        self._layer = 0

    @property
    def loads(self) -> list[Load]:
        """See `Attention`: those of full attention."""
        return [] if self._full is None else self._full.loads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`."""
        assert isinstance(stream, SlicesOnDemand)
        layer, self._layer = self._layer, self._layer + 1
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        if self._full is not None:
            out[self._full_rows] = self._full.attend(q[self._full_rows], k, v, layer_pool, stream)
        coded = None
        if self._filled is not None:  # behind the tokens of the prompt, whose own page may be one of these
            assert self._tools.codec is not None
            coded = self._filled.round(self._tools.codec, layer_pool)
        if self._summarising is not None:
            self._summarising.fill(layer, layer_pool, stream)
        if self._turns:
            out[self._choosing_rows] = self._attend_chosen(layer, q[self._choosing_rows], layer_pool, stream, coded)
        if self._layer == self._tools.num_layers:
            self._end(stream)
        return out

    def _end(self, stream: SlicesOnDemand) -> None:
        """Takes note that the last layer has ended."""
        if self._summarising is not None:
            self._summarising.end(stream)
        if self._row_policy is None:
            for turn in self._turns:
                for one in turn.choosers:
                    one.step.memory.end(int(one.positions[-1]) + 1)

    def _attend_chosen(
        self, layer: int, q: Tensor, layer_pool: Tensor, stream: SlicesOnDemand, coded: CodedPages | None
    ) -> Tensor:
        """q `[R, K * G, D]` of the rows that choose -> `[R, K * G * D]`."""
        tools = self._tools
        all_heads = q.view(len(q) * tools.num_kv_heads, -1, q.shape[2])
        pool = layer_pool.view(2, -1, 1, *layer_pool.shape[3:])
        bring = partial(stream.bring, layer)
        out = q.new_empty(len(all_heads), all_heads.shape[1] * all_heads.shape[2])
        for turn in self._turns:
            calls = self._plan_turn(turn, layer, q, stream)
            is_whole = len(self._turns) == 1 and not turn.observed
            by_head = all_heads if is_whole else all_heads[turn.order]
            for load in calls.loads:
                stream.expect(layer, *load)
            if not turn.observed:
                tools.meter.count("pages_chosen", len(calls.table))
                tools.meter.count("pages_visible", turn.num_visible)
                if self._is_audited:
                    self._audit(turn, calls, by_head, pool, bring, coded, stream)
            if self._row_policy is not None:
                found = attend_chosen(tools.library, calls, by_head, pool, bring, coded)
            else:
                found, weights = attend_and_weigh(tools.library, calls, by_head, pool, bring, coded)
                self._observe(turn, layer, weights)
            if is_whole:
                out = found
            else:
                out[turn.order] = found
        return out.view(len(q), -1)

    def _audit(
        self, turn: Turn, calls: ChosenCalls, by_head: Tensor, pool: Tensor, bring: Bring, coded: CodedPages | None,
        stream: SlicesOnDemand,
    ) -> None:  # fmt: skip
        """Measures how much of all attention the chosen pages have."""
        tools = self._tools
        if turn.all_calls is None:
            turn.all_calls = self._plan(turn, turn.everything(), stream)
        chosen, all_of_it = (
            total_weights(tools.library, each, by_head, pool, bring, coded) for each in (calls, turn.all_calls)
        )
        parts = covered(chosen, all_of_it)
        tools.meter.count("num_audited", len(parts))
        tools.meter.count("mass_covered", float(parts.sum()))

    def _plan_turn(self, turn: Turn, layer: int, q: Tensor, stream: SlicesOnDemand) -> ChosenCalls:
        if turn.calls is not None:
            return turn.calls
        policy = self._row_policy
        if turn.observed:
            choice = turn.everything()
        elif policy is not None:
            choice = [row for one in turn.choosers for row in policy.choose(self._rows(one, layer, q[one.rows]))]
        else:
            rows = ((one, self._rows(one, layer, q[one.rows])) for one in turn.choosers)
            choice = [one.step.memory.layers[layer].choose(row) for one, row in rows]
        calls = self._plan(turn, choice, stream)
        if turn.observed or (policy is not None and not policy.looks_at_queries):
            turn.calls = calls
        return calls

    def _plan(self, turn: Turn, choice: Choice, stream: SlicesOnDemand) -> ChosenCalls:
        chosen = turn.gather(choice, None if self._filled is None else self._filled.of_rows)
        return plan_chosen(chosen, self._tools.page_size, self._tools.num_kv_heads, stream.capacity)

    def _observe(self, turn: Turn, layer: int, weights: list[np.ndarray]) -> None:
        """Tells the memories of sequences what their tokens have attended to."""
        kv_heads = self._tools.num_kv_heads
        for number, one in enumerate(turn.choosers):
            own = weights[number * kv_heads : (number + 1) * kv_heads]
            for token in range(len(one.positions)):
                one.step.memory.layers[layer].observe([pages[:, token] for pages in own])

    def _rows(self, one: Choosers, layer: int, q: Tensor) -> Rows:
        """What the policy is told of a sequence's rows."""
        tools, ids = self._tools, one.step.page_ids

        def mean_keys() -> Tensor:
            assert tools.summaries is not None
            return tools.summaries.layer(layer)[ids]

        def weights() -> np.ndarray:
            assert tools.summaries is not None
            own_pages = one.positions // tools.page_size
            return expected_weights(tools.library, q, tools.summaries.layer(layer), ids, own_pages)

        return Rows(one.positions, tools.page_size, tools.num_kv_heads, q, mean_keys, weights)


def plan_policy_attention(
    tools: Tools, steps: list[SequenceStep], buffer_pages: int
) -> NativeAttention | PolicyAttention:
    """The attention of a step for a rank with `buffer_pages` pages in a buffer of its staging ring. Raises DistKVError
    as `SequenceMemory.begin` does."""
    policy, num_last = tools.policy, num_observed(tools.policy)
    full, full_rows, choosers, choosing_rows = [], [], [], []
    first = num_choosing = 0
    for one in steps:
        count, first_choosing = len(one.token_ids), max(0, one.prompt_len - num_last)
        num_full = min(max(first_choosing - one.start, 0), count)
        if num_full:
            pages = one.pages[: -(-(one.start + num_full) // tools.page_size)]
            full.append(SequenceStep(one.token_ids[:num_full], one.start, pages, one.prompt_len, 0))
            full_rows.append(np.arange(first, first + num_full))
        if num_full < count:
            positions = np.arange(one.start + num_full, one.start + count)
            choosers.append(Choosers(one, positions, slice(num_choosing, num_choosing + len(positions))))
            choosing_rows.append(np.arange(first + num_full, first + count))
            num_choosing += len(positions)
            if isinstance(policy, SequentialPolicy):
                one.memory.begin(one.start, first_choosing, tools.new_memories)
        first += count
    by_full = None
    if full:
        by_full = plan_native_attention(tools.library, full, tools.page_size, buffer_pages, tools.codec)
    summarising = filled = None
    if tools.summaries is not None:
        summarising = Summarising(tools.summaries, steps, [one.step for one in choosers], tools.page_size, tools.codec)
    if tools.codec is not None and choosers:
        filled = plan_filled([(one.step, one.positions) for one in choosers], tools.page_size)
    if summarising is None and not choosers:
        assert by_full is not None
        return by_full
    nothing = np.zeros(0, dtype=np.int64)
    turns = plan_turns(choosers, tools.page_size, tools.num_kv_heads, isinstance(policy, SequentialPolicy))
    return PolicyAttention(
        tools, by_full, np.concatenate([nothing, *full_rows]), turns, np.concatenate([nothing, *choosing_rows]),
        summarising, filled,
    )  # fmt: skip
