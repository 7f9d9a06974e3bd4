"""A step's tensors and its attention: mixed steps over scattered, shared and half-filled pages."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import relative_error, seeded, sequence_step
from torch import Tensor

from distkv.kernels import reference
from distkv.storage.device import CpuDevice
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, location
from distkv.workers.attention.cpu import CpuAttention, Run, _visiting_order, plan_cpu_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS, Attention, step_tokens

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BUFFER_PAGES = 4


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step and the shape of the model, without a place for their pages yet."""

    lengths: list[tuple[int, int]]  # (tokens before the step, new tokens) of each sequence
    shared: list[int]  # the first pages that each sequence has in common with the one before, at most
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0
    pages: list[list[int]] = field(init=False)  # of each sequence, as numbers 0 .. num_pages - 1
    num_pages: int = field(init=False)

    def __post_init__(self) -> None:
        pages: list[list[int]] = []
        taken = 0
        for index, (start, count) in enumerate(self.lengths):
            common: list[int] = []
            if index:
                # only full pages that neither sequence writes in this step
                full = min(start, self.lengths[index - 1][0]) // self.page_size
                common = pages[-1][: min(full, self.shared[index])]
            own = -(-(start + count) // self.page_size) - len(common)
            pages.append(common + list(range(taken, taken + own)))
            taken += own
        object.__setattr__(self, "pages", pages)
        object.__setattr__(self, "num_pages", taken)


PlanAttention = Callable[[list[SequenceStep], Sequences], Attention]


def plan_on_cpu(steps: list[SequenceStep], s: Sequences) -> CpuAttention:
    return plan_cpu_attention(steps, s.page_size, s.group, BUFFER_PAGES, s.dtype)


@dataclass(frozen=True)
class Step:
    """A step whose pages have found their slots in a pool."""

    sequences: Sequences
    tables: list[list[int]]
    pool: Tensor  # [2, slots, K, S, D]
    steps: list[SequenceStep]
    q: Tensor  # [T, H, D]

    def attend(self, plan: PlanAttention = plan_on_cpu) -> Tensor:
        """Attention of the step: `[T, H * D]`."""
        return plan(self.steps, self.sequences).attend(self.q, *self.new_kv(self.pool), self.pool, None)

    def new_kv(self, pool: Tensor) -> Tensor:
        """Keys and values of the new tokens: `[2, T, K, D]`."""
        tokens = step_tokens(self.steps, self.sequences.page_size)
        page, offset = torch.from_numpy(tokens.page), torch.from_numpy(tokens.offset)
        return torch.stack([pool[0][page, :, offset], pool[1][page, :, offset]])

    def attend_with_cold(self, cold: set[int], plan: PlanAttention = plan_on_cpu) -> Tensor:
        """The same with the given page numbers in a host pool; their device slots hold large numbers."""
        s = self.sequences
        spec = PageSpec(1, s.kv_heads, s.page_size, s.head_dim, s.dtype)
        host = HostPool(spec, 2 * s.num_pages, pinned=False)
        pool, places = self.pool.clone(), {}
        shuffled = torch.randperm(2 * s.num_pages, generator=seeded(s.seed)).tolist()
        for pages, slots in zip(s.pages, self.tables, strict=True):
            for page, slot in zip(pages, slots, strict=True):
                if page in cold:
                    places[slot] = location(Tier.HOST, shuffled[page])
                    host.store(shuffled[page], self.pool[:, slot].contiguous()[None])
                    pool[:, slot] = 6e4
        parts = [
            sequence_step(one.token_ids, one.start, [places.get(p, p) for p in one.pages.tolist()], one.prompt_len, 1)
            for one in self.steps
        ]
        attention = plan(parts, s)
        ring = StagingRing(spec, NUM_BUFFERS * 32, host, None, None, CpuDevice())
        loads = attention.loads
        if not loads:
            return attention.attend(self.q, *self.new_kv(pool), pool, None)
        stream = ring.begin(loads)
        out = attention.attend(self.q, *self.new_kv(pool), pool, stream)
        stream.close()
        # each group of the step brings a page once, however many of its sequences share it
        assert ring.bytes == {Tier.HOST: sum(len(load) for load in loads) * spec.layer_slice_bytes}
        assert {place for load in loads for place in load} == set(places.values())
        return out

    def expected(self) -> list[tuple[slice, Tensor]]:
        """For each sequence its rows of the step and their attention, `[tokens, H * D]` in float64."""
        expected, first = [], 0
        for (start, count), table in zip(self.sequences.lengths, self.tables, strict=True):
            rows = slice(first, first + count)
            keys, values = reference.read_pages(self.pool, table, start + count)
            out, _ = reference.attention(self.q[rows].unflatten(1, (self.sequences.kv_heads, -1)), keys, values)
            expected.append((rows, out.flatten(1)))
            first += count
        return expected

    def assert_right(self, plan: PlanAttention = plan_on_cpu) -> None:
        result = self.attend(plan)
        assert result.dtype == self.sequences.dtype
        for index, (rows, out) in enumerate(self.expected()):
            error = relative_error(result[rows], out)
            assert error < TOLERANCE[self.sequences.dtype], f"sequence {index}: {error}"


def place(sequences: Sequences, slots: list[int], garbage: float = 6e4) -> Step:
    """Puts the pages into the given slots, one for each page number; every place without a token holds `garbage`."""
    s, generator = sequences, seeded(sequences.seed)
    content = (torch.randn(2, s.num_pages, s.kv_heads, s.page_size, s.head_dim, generator=generator) * 1.5).to(s.dtype)
    filled = torch.zeros(s.num_pages, s.page_size, dtype=torch.bool)
    for (start, count), pages in zip(s.lengths, s.pages, strict=True):
        *full, last = pages
        filled[full] = True
        filled[last, : start + count - len(full) * s.page_size] = True
    content.masked_fill_(~filled[None, :, None, :, None], garbage)
    pool = torch.full((2, max(slots) + 2, s.kv_heads, s.page_size, s.head_dim), garbage, dtype=s.dtype)
    pool[:, slots] = content

    tables = [[slots[page] for page in pages] for pages in s.pages]
    tokens = sum(count for _, count in s.lengths)
    plans = [
        sequence_step([7] * count, start, table, start + count, 1)
        for (start, count), table in zip(s.lengths, tables, strict=True)
    ]
    # queries are a view of queries and keys side by side, as in the model
    rotated = torch.randn(tokens, s.kv_heads * (s.group + 1), s.head_dim, generator=generator).to(s.dtype)
    return Step(s, tables, pool, plans, rotated[:, : s.kv_heads * s.group])


starts = st.one_of(st.integers(0, 20), st.integers(0, 400))
counts = st.one_of(st.just(1), st.integers(1, MAX_DECODE_TOKENS), st.integers(MAX_DECODE_TOKENS + 1, 60))


@st.composite
def any_sequences(draw: st.DrawFn, new_tokens: st.SearchStrategy[int] = counts) -> Sequences:
    lengths = draw(st.lists(st.tuples(starts, new_tokens), min_size=1, max_size=6))
    return Sequences(
        lengths=lengths,
        shared=draw(st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths))),
        page_size=draw(st.sampled_from([16, 32, 64, 256])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 16, 64, 80])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def slots_for(draw: st.DrawFn, num_pages: int) -> list[int]:
    """Distinct slots: neighbours, backwards, or scattered with gaps."""
    arrangement = draw(st.sampled_from(["in order", "reversed", "scattered"]))
    slots = list(range(1, num_pages + 1))
    if arrangement == "reversed":
        return slots[::-1]
    if arrangement == "scattered":
        return draw(st.permutations(range(num_pages + 4)))[:num_pages]
    return slots


@given(st.data())
def test_any_step_is_right(data: st.DataObject) -> None:
    """Decodes, sequences with a few new tokens and chunks of prompts, in one step, over pages anywhere."""
    sequences = data.draw(any_sequences())
    place(sequences, data.draw(slots_for(sequences.num_pages))).assert_right()


@pytest.mark.parametrize("count", range(1, MAX_DECODE_TOKENS + 1))
def test_few_tokens_that_cross_a_page(count: int) -> None:
    """Wherever in its page a sequence stands, tokens before a page must not see it, and those in it see their past."""
    lengths = [(start, count) for start in range(16 - count, 34)]
    sequences = Sequences(lengths, [0] * len(lengths))
    place(sequences, list(range(sequences.num_pages))[::-1]).assert_right()
    for length in lengths:  # each alone: the group is the whole step, and pages in order need no reordering
        single = Sequences([length], [0], dtype=torch.bfloat16)
        place(single, list(range(single.num_pages))).assert_right()


def test_decodes_that_share_a_prefix() -> None:
    """A slot that several tables name serves each of them."""
    lengths = [(100, 1), (97, 1), (300, 1), (96, 1), (111, 1)]
    sequences = Sequences(lengths, [6] * 5)
    assert sequences.num_pages < sum(len(pages) for pages in sequences.pages)
    place(sequences, list(range(sequences.num_pages))).assert_right()


@given(st.data())
def test_answers_do_not_depend_on_the_slots(data: st.DataObject) -> None:
    """The same pages elsewhere in the pool: bitwise the same."""
    sequences = data.draw(any_sequences())
    in_order = place(sequences, list(range(sequences.num_pages))).attend()
    assert torch.equal(place(sequences, data.draw(slots_for(sequences.num_pages))).attend(), in_order)


@given(st.data())
def test_answers_do_not_depend_on_the_tier(data: st.DataObject) -> None:
    """Any of the full pages streamed from the host, in decodes and chunks of prompts: bitwise the same."""
    sequences = data.draw(any_sequences())
    step = place(sequences, data.draw(slots_for(sequences.num_pages)))
    full = {
        page
        for (start, _), pages in zip(sequences.lengths, sequences.pages, strict=True)
        for page in pages[: start // sequences.page_size]
    }
    share = data.draw(st.sampled_from([1.0, 0.5]))
    cold = {page for page in full if share == 1 or data.draw(st.booleans())}
    assert torch.equal(step.attend_with_cold(cold), step.attend())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_many_pages_in_any_slots(dtype: torch.dtype, kv_heads: int, group: int) -> None:
    """Decodes over many pages, in order, reversed, scattered and with gaps between all: bitwise one result."""
    for lengths in ([(16 * 90 + 5, 1)], [(16 * 90 + 4, 4)], [(16 * 90 + 14, 3)], [(16 * 70 + 5, 1), (16 * 30, 1)]):
        sequences = Sequences(
            lengths, [0] * len(lengths), kv_heads=kv_heads, group=group, head_dim=64, dtype=dtype, seed=3
        )
        count = sequences.num_pages
        in_order = place(sequences, list(range(count))).attend()
        scattered = torch.randperm(count, generator=seeded(1)).tolist()
        for slots in (list(range(count))[::-1], scattered, list(range(0, 2 * count, 2))):
            assert torch.equal(place(sequences, slots).attend(), in_order), (lengths, slots)


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 64), (3, 3, 64), (2, 4, 80), (1, 8, 128)])
def test_answers_do_not_depend_on_the_threads(
    kv_heads: int, group: int, head_dim: int, set_threads: Callable[[int], None]
) -> None:
    """Decodes, few tokens and prompts, over many pages: bitwise the same with one thread, two or three."""
    lengths = [(16 * 90 + 5, 1), (777, 1), (500, 3), (300, 41)]
    shape = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    steps = [
        place(sequences, list(range(sequences.num_pages)))
        for sequences in (Sequences(lengths, [0] * 4, **shape), Sequences(lengths[:1], [0], **shape))
    ]
    answers = []
    for threads in (1, 2, 3):
        set_threads(threads)
        answers.append(torch.cat([step.attend() for step in steps]))
    assert torch.equal(answers[1], answers[0])
    assert torch.equal(answers[2], answers[0])


@given(st.data())
def test_unused_places_have_no_influence(data: st.DataObject) -> None:
    """Whatever finite numbers lie where no token is, not one bit changes."""
    sequences = data.draw(any_sequences())
    slots = data.draw(slots_for(sequences.num_pages))
    zeros = place(sequences, slots, garbage=0.0).attend()
    for garbage in (6e4, -6e4):
        assert torch.equal(place(sequences, slots, garbage).attend(), zeros)


@given(st.data())
def test_step_tokens(data: st.DataObject) -> None:
    """Where each token goes, and which rows ask for logits."""
    page_size = 16
    lengths = data.draw(st.lists(st.tuples(starts, counts), min_size=1, max_size=5))
    plans, rows, first = [], [], 0
    for start, count in lengths:
        slots = data.draw(st.permutations(range(40)))[: -(-(start + count) // page_size)]
        num_logits, prompt_len = data.draw(st.integers(0, count)), data.draw(st.integers(1, 500))
        token_ids = data.draw(st.lists(st.integers(0, 999), min_size=count, max_size=count))
        plans.append(sequence_step(token_ids, start, slots, prompt_len, num_logits))
        rows += range(first + count - num_logits, first + count)
        first += count
    found = step_tokens(plans, page_size)
    tokens = [
        (token, position, max(position + 1, plan.prompt_len), plan.pages[position // page_size], position % page_size)
        for plan in plans
        for position, token in enumerate(plan.token_ids, start=plan.start)
    ]
    columns = [found.token_ids, found.positions, found.context, found.page, found.offset]
    assert np.stack(columns, axis=1).tolist() == [list(token) for token in tokens]
    assert found.logit_rows.tolist() == rows
    assert all(array.dtype == np.int64 for array in vars(found).values())


def test_a_whole_decode_step_needs_no_indirection() -> None:
    """The fast path: one decode over neighbours is one run, without gathers or reordering."""
    sequences = Sequences([(70, 1)], [0])
    (group,) = plan_on_cpu(place(sequences, [3, 4, 5, 6, 7]).steps, sequences).decode
    assert group.runs == [Run(False, False, 3, 5)] and not group.loads
    assert group.tokens is None and group.row_owner is None and group.order is None


@given(st.lists(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=10), min_size=1, max_size=5))
def test_visiting_order(tables: list[list[int]]) -> None:
    """Each page of each table once, in the fewest runs that a visit in rounds allows."""
    slots = np.concatenate([np.array(table) for table in tables])
    order, runs = _visiting_order(slots)
    assert sorted(order.tolist()) == list(range(len(slots)))
    assert slots[order].tolist() == [slot for first, count in runs for slot in range(first, first + count)]

    fewest = 0
    for visit in range(len(tables)):  # round n visits the slots that more than n tables hold
        held = {slot for slot in range(13) if (slots == slot).sum() > visit}
        fewest += sum(slot - 1 not in held for slot in held)
    assert len(runs) == fewest
