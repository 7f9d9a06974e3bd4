"""How the kernels on CUDA are told what to compute: every key once, loads that fit, cuts on the grid."""

from collections import Counter
from itertools import chain, pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.plans import sequence_step

from distkv.kernels.page_entries import buffer_index
from distkv.storage.moving.staging_ring import Load
from distkv.storage.paging import pages_for
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention import cuda
from distkv.workers.attention.cuda import CudaShape, plan_cuda_attention
from distkv.workers.attention.decode_plan import DecodePlan, plan_decode, split_pages_for
from distkv.workers.attention.prefill_plan import PrefillPlan, plan_prefill
from distkv.workers.attention.step_loads import Member, StepLoads, plan_loads
from distkv.workers.sizes import STATE_BYTES

TILE = 4  # states, so that small contexts go through several rounds


def loads_of(sequences: list[Member], page_size: int, buffer_pages: int, most_together: int = 1000) -> StepLoads:
    cell_pages = max(1, 256 // page_size)
    return plan_loads(sequences, [(0, most_together)] * len(sequences), page_size, cell_pages, buffer_pages)


def decode_plan(
    sequences: list[Member], page_size: int, buffer_pages: int, max_states: int, tile: int, padding: int = 0
) -> tuple[DecodePlan, list[Load]]:
    brought = loads_of(sequences, page_size, buffer_pages, max_states // tile)
    count = len(sequences[0][1].token_ids)
    return plan_decode(count, sequences, 0, brought, page_size, max_states, tile, padding), brought.loads


def prefill_plan(
    sequences: list[Member], page_size: int, group_size: int, buffer_pages: int, block_rows: int,
    has_codec: bool = False,
) -> tuple[PrefillPlan, list[Load]]:  # fmt: skip
    brought = loads_of(sequences, page_size, buffer_pages)
    return plan_prefill(sequences, 0, brought, page_size, group_size, block_rows, has_codec), brought.loads


@st.composite
def members(draw: st.DrawFn, counts: st.SearchStrategy[int]) -> tuple[int, list[Member]]:
    """Page size and sequences of a step, with pages on the device, the host and the disk, some of them shared."""
    page_size = draw(st.sampled_from([16, 64, 256, 512]))
    result: list[Member] = []
    first = 0
    for number in range(draw(st.integers(1, 4))):
        count, start = draw(counts), draw(st.integers(0, 40 * page_size))
        num_pages = -(-(start + count) // page_size)
        own = 100 * number + np.arange(num_pages)
        tiers = draw(st.lists(st.sampled_from(list(Tier)), min_size=num_pages, max_size=num_pages))
        places = [encode_location(tier, int(slot)) for tier, slot in zip(tiers, own, strict=True)]
        last_full = start // page_size  # new tokens are written on the device
        places[last_full:] = own[last_full:].tolist()
        if result and draw(st.booleans()):
            before = result[-1][1]
            common = min(before.start, start) // page_size
            places[:common] = before.pages[:common].tolist()
        result.append((first, sequence_step([7] * count, start, places, start + count, 1)))
        first += count
    return page_size, result


@given(
    drawn=st.integers(1, 8).flatmap(lambda count: members(st.just(count))),
    buffer_pages=st.integers(16, 40),
    max_states=st.integers(TILE, 60),
    padding=st.integers(0, 3),
)
def test_decode_visits_every_split_once(
    drawn: tuple[int, list[Member]], buffer_pages: int, max_states: int, padding: int
) -> None:
    page_size, sequences = drawn
    count, split_pages = len(sequences[0][1].token_ids), split_pages_for(page_size)
    before = [step.pages.copy() for _, step in sequences]
    plan, all_loads = decode_plan(sequences, page_size, buffer_pages, max_states, TILE, padding)
    numbers = [one.loads for one in plan.rounds]
    assert list(chain(*numbers)) == sorted(chain(*numbers)), "loads are met in order"
    assert all(len(set(one)) == len(one) for one in numbers)

    by_row = {first: step for first, step in sequences}
    ends = dict.fromkeys(by_row, 0)  # splits that the rounds so far have covered
    for number, one in enumerate(plan.rounds):
        assert one.num_states <= max_states
        assert len(one.items) == one.num_states == sum(one.num_items)
        assert len(one.num_items) == 1 + len(one.loads)
        states = []
        for first_row, num_keys, _, _, first, end in one.sequences.tolist():
            if not num_keys:
                assert number == 0 and first == end == 0 and first_row not in by_row
                continue
            step = by_row[first_row]
            assert num_keys == step.start + count
            assert first == ends[first_row] and first % TILE == 0
            ends[first_row] = end
        launch = np.repeat(np.arange(len(one.num_items)), one.num_items)
        loads = [all_loads[index] for index in one.loads]
        for (row, split), where in zip(one.items.tolist(), launch.tolist(), strict=True):
            first_row, num_keys, entry, state, first, end = one.sequences[row].tolist()
            assert first <= split < end
            states.append(state + split)
            last = min((split + 1) * split_pages, -(-num_keys // page_size))
            pages = by_row[first_row].pages[split * split_pages : last]
            entries = plan.table[entry + split * split_pages :][: len(pages)]
            assert bool((pages < 0).any()) == bool(where)
            for page, found in zip(pages.tolist(), entries.tolist(), strict=True):
                assert found == page if page >= 0 else loads[where - 1][buffer_index(found)] == page
        assert sorted(states) == list(range(one.num_states))
        for load in loads:
            assert 0 < len(load) <= buffer_pages and len(set(load)) == len(load)
    for (first_row, step), pages in zip(sequences, before, strict=True):
        assert ends[first_row] == pages_for(pages_for(step.start + count, page_size), split_pages)
        assert np.array_equal(step.pages, pages)  # the directory's own
    rows = [row[0] for row in plan.rounds[0].sequences.tolist() if not row[1]]
    assert rows == [(len(sequences) + number) * count for number in range(padding)]


def test_sequences_that_share_cold_pages_share_their_loads() -> None:
    cold = [encode_location(Tier.HOST, slot) for slot in range(30)]
    sequences = [(row, sequence_step([7], 31 * 256 - 1, [*cold, row], 7, 1)) for row in range(3)]
    plan, loads = decode_plan(sequences, 256, 8, 4096, 32)
    (one,) = plan.rounds
    assert [len(load) for load in loads] == [8, 8, 8, 6]
    assert one.num_items == [3, 24, 24, 24, 18]


def test_splits_that_share_a_part_of_their_pages_find_it_in_each_load() -> None:
    """Three of the four pages of a split are those of a prefix; of their own each sequence has the fourth."""
    prefix = [encode_location(Tier.HOST, slot) for slot in range(3)]
    own = [encode_location(Tier.HOST, 10 + number) for number in range(6)]
    sequences = [(row, sequence_step([7], 4 * 64, [*prefix, page, row], 7, 1)) for row, page in enumerate(own)]
    plan, loads = decode_plan(sequences, 64, 5, 4096, 32)
    (one,) = plan.rounds
    assert loads == [[*prefix, *own[:2]], [*prefix, *own[2:4]], [*prefix, *own[4:]]]
    assert one.num_items == [6, 2, 2, 2]
    launch = np.repeat(np.arange(4), one.num_items)
    for (row, split), where in zip(one.items.tolist(), launch.tolist(), strict=True):
        entries = plan.table[one.sequences[row, 2] :][:5].tolist()
        if where:
            assert split == 0
            assert [loads[where - 1][buffer_index(entry)] for entry in entries[:4]] == [*prefix, own[row]]
        assert entries[4] == row


def test_decode_cuts_long_contexts_into_rounds() -> None:
    sequences = [(0, sequence_step([7], 256 * 100 - 1, range(100), 7, 1)), (1, sequence_step([7], 20, [100], 7, 1))]
    plan, _ = decode_plan(sequences, 256, 8, 70, 32)
    assert [one.num_states for one in plan.rounds] == [64, 37]
    assert plan.rounds[1].sequences[:, 3:].tolist() == [[-64, 64, 100], [36, 0, 1]]


@given(
    drawn=members(st.integers(1, 700)),
    group_size=st.integers(1, 8),
    buffer_pages=st.integers(16, 40),
    block_rows=st.sampled_from([64, 128]),
    has_codec=st.booleans(),
)
def test_prefill_walks_over_every_key_once(
    drawn: tuple[int, list[Member]], group_size: int, buffer_pages: int, block_rows: int, has_codec: bool
) -> None:
    """With a codec the tokens of each page are a chunk of their own, which knows where that lies as it was."""
    page_size, sequences = drawn
    before = [step.pages.copy() for _, step in sequences]
    plan, loads = prefill_plan(sequences, page_size, group_size, buffer_pages, block_rows, has_codec)
    by_row, filled = {}, []
    for first, step in sequences:
        edges = [step.start, step.start + len(step.token_ids)]
        if has_codec:
            borders = range(step.start // page_size * page_size + page_size, edges[1], page_size)
            edges = [edges[0], *borders, edges[1]]
        for start, end in pairwise(edges):
            own = len(filled) if has_codec and end % page_size == 0 else -1
            filled += [step.pages[start // page_size]] if own >= 0 else []
            by_row[first + start - step.start] = step, start, end - start, own
    assert plan.filled.tolist() == filled
    walked: dict[tuple[int, int], int] = {}  # (first row, block) -> keys so far
    assert len(plan.blocks) == sum(plan.num_blocks) and len(plan.num_blocks) == 1 + len(plan.loads)
    assert plan.loads == sorted(set(plan.loads))
    launch = np.repeat(np.arange(len(plan.num_blocks)), plan.num_blocks)
    for (row, block), where in zip(plan.blocks.tolist(), launch.tolist(), strict=True):
        first_row, count, position, entry, first, end, saved_at, own = plan.chunks[row].tolist()
        step, load = by_row[first_row][0], loads[plan.loads[where - 1]] if where else None
        assert by_row[first_row] == (step, position, count, own)
        assert block % block_rows == 0 and 0 <= block < count * group_size
        assert walked.get((first_row, block), 0) == first
        walked[first_row, block] = end
        assert end == position + count or end % max(128, page_size) == 0
        if first or end < position + count:
            assert saved_at + count <= plan.num_saved
        pages = step.pages[first // page_size : -(-end // page_size)]
        for page, found in zip(pages.tolist(), plan.table[entry + first // page_size :].tolist(), strict=False):
            if page >= 0:
                assert found == page
            else:
                assert load is not None and load[buffer_index(found)] == page
    assert walked == {
        (first, block): start + count
        for first, (_, start, count, _) in by_row.items()
        for block in range(0, count * group_size, block_rows)
    }
    for load in loads:
        assert 0 < len(load) <= buffer_pages
    for (_, step), pages in zip(sequences, before, strict=True):
        assert np.array_equal(step.pages, pages)


@pytest.mark.parametrize("page_size", [16, 256, 1024])
def test_prefill_over_resident_pages_is_one_launch(page_size: int) -> None:
    count = -(-5000 // page_size)
    sequences = [(0, sequence_step([7] * 90, 4910, range(count), 7, 1)), (90, sequence_step([7] * 9, 0, [count], 7, 1))]
    plan, loads = prefill_plan(sequences, page_size, 4, 8, 128)
    assert loads == plan.loads == [] and plan.num_blocks == [4] and plan.num_saved == 0
    assert plan.blocks.tolist() == [[0, 0], [0, 128], [0, 256], [1, 0]]


def test_a_million_tokens_and_an_answer_behind_them_are_one_round() -> None:
    """With the heads of Llama-3-8B."""
    shape = CudaShape(32, 8, 128, 256, 24, torch.bfloat16, num_programs=2)
    length = 2**20 + 8192
    [group] = plan_cuda_attention([sequence_step([7], length - 1, range(length // 256), length, 1)], shape).decode
    assert [one.num_states for one in group.rounds] == [length // 256]


@pytest.mark.parametrize("state_bytes", [1, STATE_BYTES], ids=["rounds", "at once"])
def test_all_that_a_step_does_with_a_shared_page_takes_one_load(state_bytes: int) -> None:
    """Answers of one and of several tokens, and chunks of prompts, over a long prefix below the device."""
    book = [encode_location(Tier.HOST, slot) for slot in range(3 * 256)]
    other = [encode_location(Tier.DISK, slot) for slot in range(100)]
    counts = [1, 1, 40, 3, 1, 40, 9]
    steps = [
        sequence_step([7] * count, 16 * len(book), [*book, *range(3 * row, 3 * row + 3)], 7, 1)
        for row, count in enumerate(counts)
    ]
    steps += [sequence_step([7], 16 * len(other), [*other, 90 + row], 7, 1) for row in range(2)]
    shape = CudaShape(4, 2, 64, 16, 24, torch.float32, num_programs=2)
    with mock.patch.object(cuda, "STATE_BYTES", max(state_bytes, 4 * 16 * shape.state_bytes * 2)):
        plan = plan_cuda_attention(steps, shape)
    assert Counter(chain(*plan.loads)) == Counter([*book, *other])
    assert len(plan.decode[0].rounds) > 1 or state_bytes > 1
    for group in plan.decode:
        numbers = list(chain(*(one.loads for one in group.rounds)))
        assert numbers == sorted(numbers), "a buffer serves all before the next one is taken"
    assert plan.prefill is not None
    kept = {(first_row, saved_at, count) for first_row, count, _, _, _, _, saved_at, _ in plan.prefill.chunks.tolist()}
    rows = Counter(chain(*(range(saved_at, saved_at + count) for _, saved_at, count in kept)))
    assert len(kept) == 3 and rows == Counter(range(plan.prefill.num_saved)), "chunks are under way side by side"
