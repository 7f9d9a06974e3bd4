"""How a step on CUDA is shared out between the device and its host: every split once, states where they belong."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from support.plans import sequence_step

from distkv.storage.tier import DEVICE, DISK, HOST, Tier, encode_location
from distkv.workers.attention import cuda
from distkv.workers.attention.cuda import CudaShape, plan_cuda_attention
from distkv.workers.page_directory import NOT_SHARED, SequenceStep
from distkv.workers.sizes import STATE_BYTES

PAGE = 256
SHAPE = CudaShape(4, 2, 16, PAGE, 16, torch.float32, 8, leaves_to_host=True)


def shared_step(start: int, count: int, seed: int) -> SequenceStep:
    """Every other full page is the host's; they lie in any tiers, those of new tokens on the device."""
    rng = np.random.default_rng(seed)
    num_pages, full = -(-(start + count) // PAGE), start // PAGE
    places, slots = [], np.full(num_pages, NOT_SHARED)
    for page in range(num_pages):
        tier = [DEVICE, HOST, DISK][rng.integers(3)] if page < full else DEVICE
        places.append(encode_location(tier, 100 * seed + page))
        if page % 2 and page < full:
            slots[page] = 100 * seed + page if tier is HOST else -1
    return replace(sequence_step([7] * count, start, places, start + count, 1), host_slots=slots)


@pytest.mark.parametrize("state_bytes", [STATE_BYTES, 1], ids=["at once", "rounds"])
def test_every_split_is_computed_once(state_bytes: int) -> None:
    steps = [shared_step(40 * PAGE + 3, 1, 1), shared_step(PAGE - 1, 1, 2), shared_step(9 * PAGE, 2, 3)]
    steps.append(sequence_step([7] * 30, 3 * PAGE, [1, 2, 3, 4], 3 * PAGE + 30, 1))  # a prompt
    with mock.patch.object(cuda, "STATE_BYTES", state_bytes):
        plan = plan_cuda_attention(steps, SHAPE)
    left = plan.left
    assert left is not None
    first_rows = {0: steps[0], 1: steps[1], 2: steps[2]}
    assert left.items[:, 6].tolist() == (np.cumsum(left.items[:, 1]) - left.items[:, 1]).tolist()
    assert left.arrays.rows.tolist() == [0, 2, 3], "rows of sequences of which the host has pages"
    seen, index = set(), 0
    for group, states in zip(plan.decode, left.arrays.states, strict=True):
        for one, there in zip(group.rounds, states, strict=True):
            mine = {(one.sequences[row, 0], split): one.sequences[row, 3] + split for row, split in one.items.tolist()}
            for state in there.tolist():
                row, count, start, page, entry, exact, _ = left.items[index].tolist()
                row = int(left.arrays.rows[row])
                step = first_rows[row]
                assert (count, start, exact) == (len(step.token_ids), step.start, -1)
                tier = Tier(int(left.tiers[index]))
                place = left.arrays.slots[entry] if tier == DEVICE else entry
                assert step.pages[page] == encode_location(tier, int(place)) and page % 2
                mine[row, page] = state
                index += 1
            assert sorted(mine.values()) == list(range(one.num_states)), "each state has one writer"
            assert sum(one.num_items) == len(one.items)
            seen |= mine.keys()
    assert index == len(left.items)
    assert seen == {(row, page) for row, step in first_rows.items() for page in range(len(step.pages))}
    brought = {place for load in plan.loads for place in load}
    theirs = {place for step in first_rows.values() for place in step.pages[step.host_slots == NOT_SHARED].tolist()}
    assert brought == {place for place in theirs if place < 0}, "no load has a page of the host's"


def test_without_a_share_nothing_is_left() -> None:
    steps = [replace(shared_step(9 * PAGE, 1, 1), host_slots=np.zeros(0, dtype=np.int64))]
    assert plan_cuda_attention(steps, SHAPE).left is None
