"""Attention of a step in which some tokens choose their pages, by the native kernels of a CPU.

A page of one KV head is to these kernels a page of a model that has but one: the pool `[2, slots, K, S, D]` is viewed
as `[2, slots * K, 1, S, D]`, and each token's query heads of a KV head are a token of their own. So each of these meets
the pages that it has chosen in logical order, by the arithmetic of any other: one that chooses all of them has the
bits of full attention.

Tokens of prompts attend to everything, as they do without a policy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count

import numpy as np
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import Library
from distkv.kernels.native.page_bounds import page_bounds
from distkv.kernels.native.paged_attention import CodedPages
from distkv.storage.meter import Meter
from distkv.storage.moving.slices_on_demand import SlicesOnDemand
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.pools.page_summaries import PageSummaries
from distkv.workers.attention.chosen_attention import attend_chosen, covered, total_weights
from distkv.workers.attention.chosen_pages import ChosenCalls, ChosenPages, plan_chosen
from distkv.workers.attention.filled_pages import FilledPages, plan_filled
from distkv.workers.attention.native import NativeAttention, plan_native_attention
from distkv.workers.attention.policies.policy import Choice, PagePolicy, Rows
from distkv.workers.attention.summarising import Summarising
from distkv.workers.page_directory import SequenceStep


@dataclass(frozen=True)
class Choosers:
    """The tokens of one sequence's answer in a step."""

    step: SequenceStep
    positions: np.ndarray  # int64
    rows: slice  # among all that choose in the step


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


class PolicyAttention:
    """An `Attention`, see `batch.py`, whose stream is a `SlicesOnDemand`."""

    def __init__(
        self, tools: Tools, full: NativeAttention | None, full_rows: np.ndarray, choosers: list[Choosers],
        choosing_rows: np.ndarray, summarising: Summarising | None, filled: FilledPages | None, is_audited: bool,
    ):  # fmt: skip
        """
        Args:
            full: the attention of all rows that do not choose, if there are any.
            full_rows, choosing_rows: which rows of the step attend how, in the order of `full` and of `choosers`.
            filled: needed where there is a codec and some rows choose.
            is_audited: it is measured how much of all attention the chosen pages have.
        """
        self._tools, self._full, self._choosers, self._summarising = tools, full, choosers, summarising
        self._full_rows, self._choosing_rows = full_rows, choosing_rows
        self._filled, self._is_audited = filled, is_audited
        self._layer = 0
        self._calls: ChosenCalls | None = None  # where they are the same in all layers
        self._all_calls: ChosenCalls | None = None  # where everything is chosen, for an audit

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
        if self._choosers:
            out[self._choosing_rows] = self._attend_chosen(layer, q[self._choosing_rows], layer_pool, stream, coded)
        if self._summarising is not None and self._layer == self._tools.num_layers:
            self._summarising.end(stream)
        return out

    def _attend_chosen(
        self, layer: int, q: Tensor, layer_pool: Tensor, stream: SlicesOnDemand, coded: CodedPages | None
    ) -> Tensor:
        """q `[R, K * G, D]` of the rows that choose -> `[R, K * G * D]`."""
        tools = self._tools
        calls = self._calls
        if calls is None:
            calls = self._plan(self._choose(layer, q), stream)
            if not tools.policy.looks_at_queries:
                self._calls = calls
        tools.meter.count("pages_chosen", len(calls.table))
        tools.meter.count("pages_visible", self._num_visible)
        by_head = q.view(len(q) * tools.num_kv_heads, -1, q.shape[2])
        pool = layer_pool.view(2, -1, 1, *layer_pool.shape[3:])
        bring = partial(stream.bring, layer)
        for load in calls.loads:
            stream.expect(layer, *load)
        if self._is_audited:
            if self._all_calls is None:
                everything = [
                    [np.arange(own + 1)] * tools.num_kv_heads
                    for one in self._choosers
                    for own in (one.positions // tools.page_size).tolist()
                ]
                self._all_calls = self._plan(self._gather(everything), stream)
            chosen, all_of_it = (
                total_weights(tools.library, each, by_head, pool, bring, coded) for each in (calls, self._all_calls)
            )
            parts = covered(chosen, all_of_it)
            tools.meter.count("num_audited", len(parts))
            tools.meter.count("mass_covered", float(parts.sum()))
        return attend_chosen(tools.library, calls, by_head, pool, bring, coded).view(len(q), -1)

    def _plan(self, chosen: ChosenPages, stream: SlicesOnDemand) -> ChosenCalls:
        return plan_chosen(chosen, self._tools.page_size, self._tools.num_kv_heads, stream.capacity)

    def _choose(self, layer: int, q: Tensor) -> ChosenPages:
        """The pages of all rows."""
        return self._gather(
            [row for one in self._choosers for row in self._tools.policy.choose(self._rows(one, layer, q[one.rows]))]
        )

    def _gather(self, choice: Choice) -> ChosenPages:
        """What all rows have chosen, that of the KV heads of a row one after the other."""
        page_size, kv_heads = self._tools.page_size, self._tools.num_kv_heads
        indexes = [pages for row in choice for pages in row]
        locations = [one.step.pages[pages] for one in self._choosers for row in choice[one.rows] for pages in row]
        counts = np.array([len(pages) for pages in indexes])
        offsets = np.concatenate([one.positions for one in self._choosers]) % page_size
        heads = np.tile(np.arange(kv_heads), len(choice))
        own = np.full(len(choice), -1) if self._filled is None else self._filled.of_rows
        exact = np.where(np.repeat(own, kv_heads) < 0, -1, np.repeat(own, kv_heads) * kv_heads + heads)
        return ChosenPages(
            np.concatenate(locations), np.concatenate(indexes), counts, heads, np.repeat(offsets, kv_heads), exact
        )

    @cached_property
    def _num_visible(self) -> int:
        """Pages that the rows could choose from, for each KV head."""
        own = np.concatenate([one.positions for one in self._choosers]) // self._tools.page_size
        return int((own + 1).sum()) * self._tools.num_kv_heads

    def _rows(self, one: Choosers, layer: int, q: Tensor) -> Rows:
        """What the policy is told of a sequence's rows."""
        tools, ids = self._tools, one.step.page_ids

        def summaries() -> Tensor:
            assert tools.summaries is not None
            return tools.summaries.layer(layer)[ids]

        def upper_bounds() -> np.ndarray:
            assert tools.summaries is not None
            return page_bounds(tools.library, q, tools.summaries.layer(layer), ids)

        return Rows(one.positions, tools.page_size, tools.num_kv_heads, q, summaries, upper_bounds)


def plan_policy_attention(
    tools: Tools, steps: list[SequenceStep], buffer_pages: int
) -> NativeAttention | PolicyAttention:
    """The attention of a step for a rank with `buffer_pages` pages in a buffer of its staging ring."""
    full, full_rows, choosers, choosing_rows = [], [], [], []
    first = num_choosing = 0
    for one in steps:
        count = len(one.token_ids)
        num_full = min(max(one.prompt_len - one.start, 0), count)
        if num_full:
            pages = one.pages[: -(-(one.start + num_full) // tools.page_size)]
            full.append(SequenceStep(one.token_ids[:num_full], one.start, pages, one.prompt_len, 0))
            full_rows.append(np.arange(first, first + num_full))
        if num_full < count:
            positions = np.arange(one.start + num_full, one.start + count)
            choosers.append(Choosers(one, positions, slice(num_choosing, num_choosing + len(positions))))
            choosing_rows.append(np.arange(first + num_full, first + count))
            num_choosing += len(positions)
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
    return PolicyAttention(
        tools, by_full, np.concatenate([nothing, *full_rows]), choosers, np.concatenate([nothing, *choosing_rows]),
        summarising, filled, bool(choosers) and tools.audits(),
    )  # fmt: skip
