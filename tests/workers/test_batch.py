"""A step's tensors and its attention: mixed steps over scattered, shared and half-filled pages."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attention_steps import PlanAttention, Sequences, place, plan_natively, plan_on_cpu, slots_for
from support.measures import TOLERANCE
from support.plans import sequence_step
from support.prompts import seeded

from distkv.workers.attention.cpu import Run, _visiting_order
from distkv.workers.runners.batch import MAX_DECODE_TOKENS, step_tokens

of_a_cpu = pytest.mark.parametrize("plan", [plan_on_cpu, plan_natively], ids=["torch", "native"])
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


@of_a_cpu
@given(st.data())
def test_any_step_is_right(plan: PlanAttention, data: st.DataObject) -> None:
    """Decodes, sequences with a few new tokens and chunks of prompts, in one step, over pages anywhere."""
    sequences = data.draw(any_sequences())
    place(sequences, data.draw(slots_for(sequences.num_pages))).assert_right(plan)


@of_a_cpu
@pytest.mark.parametrize("count", range(1, MAX_DECODE_TOKENS + 1))
def test_few_tokens_that_cross_a_page(plan: PlanAttention, count: int) -> None:
    """Wherever in its page a sequence stands, tokens before a page must not see it, and those in it see their past."""
    lengths = [(start, count) for start in range(16 - count, 34)]
    sequences = Sequences(lengths, [0] * len(lengths))
    place(sequences, list(range(sequences.num_pages))[::-1]).assert_right(plan)
    for length in lengths:  # each alone: the group is the whole step, and pages in order need no reordering
        single = Sequences([length], [0], dtype=torch.bfloat16)
        place(single, list(range(single.num_pages))).assert_right(plan)


@of_a_cpu
def test_decodes_that_share_a_prefix(plan: PlanAttention) -> None:
    """A slot that several tables name serves each of them."""
    lengths = [(100, 1), (97, 1), (300, 1), (96, 1), (111, 1)]
    sequences = Sequences(lengths, [6] * 5)
    assert sequences.num_pages < sum(len(pages) for pages in sequences.pages)
    place(sequences, list(range(sequences.num_pages))).assert_right(plan)


@of_a_cpu
@given(st.data())
def test_answers_do_not_depend_on_the_slots(plan: PlanAttention, data: st.DataObject) -> None:
    """The same pages elsewhere in the pool: bitwise the same."""
    sequences = data.draw(any_sequences())
    in_order = place(sequences, list(range(sequences.num_pages))).attend(plan)
    assert torch.equal(place(sequences, data.draw(slots_for(sequences.num_pages))).attend(plan), in_order)


@of_a_cpu
@given(st.data())
def test_answers_do_not_depend_on_the_tier(plan: PlanAttention, data: st.DataObject) -> None:
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
    assert torch.equal(step.attend_with_cold(cold, plan), step.attend(plan))


@of_a_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_many_pages_in_any_slots(plan: PlanAttention, dtype: torch.dtype, kv_heads: int, group: int) -> None:
    """Decodes over many pages, in order, reversed, scattered and with gaps between all: bitwise one result."""
    for lengths in ([(16 * 90 + 5, 1)], [(16 * 90 + 4, 4)], [(16 * 90 + 14, 3)], [(16 * 70 + 5, 1), (16 * 30, 1)]):
        sequences = Sequences(
            lengths, [0] * len(lengths), kv_heads=kv_heads, group=group, head_dim=64, dtype=dtype, seed=3
        )
        count = sequences.num_pages
        in_order = place(sequences, list(range(count))).attend(plan)
        scattered = torch.randperm(count, generator=seeded(1)).tolist()
        for slots in (list(range(count))[::-1], scattered, list(range(0, 2 * count, 2))):
            assert torch.equal(place(sequences, slots).attend(plan), in_order), (lengths, slots)


@of_a_cpu
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 64), (3, 3, 64), (2, 4, 80), (1, 8, 128)])
def test_answers_do_not_depend_on_the_threads(
    plan: PlanAttention, kv_heads: int, group: int, head_dim: int, set_threads: Callable[[int], None]
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
        answers.append(torch.cat([step.attend(plan) for step in steps]))
    assert torch.equal(answers[1], answers[0])
    assert torch.equal(answers[2], answers[0])


@of_a_cpu
@given(st.data())
def test_unused_places_have_no_influence(plan: PlanAttention, data: st.DataObject) -> None:
    """Whatever finite numbers lie where no token is, not one bit changes."""
    sequences = data.draw(any_sequences())
    slots = data.draw(slots_for(sequences.num_pages))
    zeros = place(sequences, slots, garbage=0.0).attend(plan)
    for garbage in (6e4, -6e4):
        assert torch.equal(place(sequences, slots, garbage).attend(plan), zeros)


@given(st.data())
def test_a_token_is_a_function_of_its_sequence_up_to_it(data: st.DataObject) -> None:
    """Each sequence of a step, cold pages and all, has bitwise the attention of all its tokens in one chunk, and of one
    after the other."""
    sequences = data.draw(any_sequences())
    step = place(sequences, data.draw(slots_for(sequences.num_pages)))
    found, first = step.attend(plan_natively), 0
    for (start, count), table in zip(sequences.lengths, step.tables, strict=True):
        rows = slice(first, first + count)
        q = torch.cat([torch.zeros(start, *step.q.shape[1:], dtype=step.q.dtype), step.q[rows]])
        whole = [sequence_step([7] * (start + count), 0, table, start + count, 1)]
        alone = plan_natively(whole, sequences).attend(q, q, q, step.pool, None)
        assert torch.equal(alone[start:], found[rows])
        for position in range(start, start + count):
            one = [sequence_step([7], position, table[: position // sequences.page_size + 1], position + 1, 1)]
            each = plan_natively(one, sequences).attend(q[position : position + 1], q, q, step.pool, None)
            assert torch.equal(each, alone[position : position + 1])
        first += count


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
