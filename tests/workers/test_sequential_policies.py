"""Policies of attention that remember: what they are told of the tokens before, and what decay makes of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attention_steps import Sequences
from support.measures import TOLERANCE
from support.policy_steps import attend

from distkv.workers.attention.policies.decay import Decay
from distkv.workers.attention.policies.policy import Rows
from distkv.workers.attention.sequence_memory import SequenceMemory
from distkv.workers.errors import DistKVError


@dataclass(frozen=True)
class Noting:
    """Chooses by what it was told last, and notes all of it."""

    needs_summaries = False
    num_observed = 20

    def begin(self, num_kv_heads: int) -> "Notes":
        return Notes(num_kv_heads)

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        return num_pages


class Notes:
    def __init__(self, num_kv_heads: int):
        self.num_kv_heads = num_kv_heads
        self.chosen: list[list[np.ndarray]] = []
        self.told: list[list[np.ndarray]] = []

    def choose(self, row: Rows) -> list[np.ndarray]:
        [own] = row.own_pages.tolist()
        last = self.told[-1] if self.told else [np.zeros(0)] * self.num_kv_heads
        wanted = [np.random.default_rng(list(one.tobytes())).random(own) < 0.5 for one in last]
        self.chosen.append([np.flatnonzero([*one, True]) for one in wanted])
        return self.chosen[-1]

    def observe(self, weights: list[np.ndarray]) -> None:
        self.told.append(weights)


SEQUENCES = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=2)


@given(
    SEQUENCES, st.integers(1, 3), st.integers(1, 3), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_weights_are_told_token_after_token(
    lengths: list[tuple[int, int]], kv_heads: int, group: int, dtype: torch.dtype, seed: int, cold: float
) -> None:
    """Of the last tokens of the prompt too, which attend to all pages; against float64."""
    if cold:  # all of the prompt that the step reads is observed: other rows would have loads of their own
        lengths = [(20, answer) for _, answer in lengths]
    start = 48 if cold else 0
    whole = [(start, prompt + answer) for prompt, answer in lengths]
    s = Sequences(whole, [0] * len(whole), kv_heads=kv_heads, group=group, dtype=dtype, seed=seed)
    _, step, counts = attend(Noting(), s, [start + prompt for prompt, _ in lengths], cold)
    row = visible = 0
    for one, (count, answer) in zip(step.steps, lengths, strict=True):
        notes: Any = one.memory.layers[0]
        prompt = start + count
        first = max(0, prompt - 20)
        assert len(notes.told) == prompt + answer - first and len(notes.chosen) == answer
        assert one.memory.position == prompt + answer
        for position, told in enumerate(notes.told, first):
            pages = [np.arange(position // 16 + 1)] * kv_heads
            if position >= prompt:
                pages = notes.chosen[position - prompt]
                visible += len(told) * (position // 16 + 1)
            for head, (chosen, found) in enumerate(zip(pages, told, strict=True)):
                tokens = (chosen[:, None] * 16 + np.arange(16)).reshape(-1)
                seen = torch.from_numpy(tokens <= position)
                slots = torch.from_numpy(one.pages)[tokens // 16 * seen.numpy()]
                keys = step.pool[0, slots, head, tokens % 16].double()
                q = step.q[row + position - start].unflatten(0, (kv_heads, group))[head].double()
                scores = (q @ keys.T * s.head_dim**-0.5).masked_fill(~seen, -torch.inf)
                weights = scores.softmax(-1).unflatten(-1, (-1, 16)).sum((0, 2)).numpy()
                assert found == pytest.approx(weights, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
        row += count + answer
    assert counts.get("pages_visible", 0) == visible, "of answers alone"


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**32 - 1), st.data())
def test_what_is_told_does_not_depend_on_steps(prompt: int, answer: int, seed: int, data: st.DataObject) -> None:
    """Bit for bit, and so is what comes of it."""
    s = Sequences([(0, prompt + answer)], [0], group=3, dtype=torch.bfloat16, seed=seed)
    cuts = data.draw(st.sets(st.integers(1, prompt + answer), max_size=9)) - {prompt + answer}
    (expected, whole, _), (found, cut, _) = (attend(Noting(), s, [prompt], cuts=part) for part in ([], sorted(cuts)))
    assert torch.equal(found, expected)
    told, again = (step.steps[0].memory.layers[0].told for step in (whole, cut))
    assert len(told) == len(again)
    for ours, theirs in zip(told, again, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def one_row(position: int, page_size: int, kv_heads: int) -> Rows:
    unused: Any = None
    return Rows(np.array([position]), page_size, kv_heads, unused, unused, unused)


@pytest.mark.parametrize("policy", [Decay(share=0.3, half_life=5), Decay(pages=4), Decay(share=1), Decay(pages=2)])
def test_masses_follow_the_law(policy: Decay) -> None:
    """Page by page, with sums that are taken anew for each row."""
    rng, page_size, prompt, heads = np.random.default_rng(1), 4, 37, 2
    memory = policy.begin(heads)
    given: list[dict[tuple[int, int], float]] = []
    gone: set[tuple[int, int]] = set()
    for position in range(prompt - 11, 150):
        own = position // page_size
        if position >= prompt:
            budget = policy.num_chosen(own + 1, page_size)
            chosen = memory.choose(one_row(position, page_size, heads))
            for head in range(heads):
                age = {page: 0.0 for page in range(own + 1) if (head, page) not in gone}
                for page in age:
                    for rows_ago, weights in enumerate(reversed(given)):
                        age[page] += weights.get((head, page), 0.0) * 0.5 ** (rows_ago / policy.half_life)
                newest = sorted(age)[-(budget // 2) :] if len(age) > budget else sorted(age)
                others = sorted((page for page in age if page not in (0, *newest)), key=lambda page: (-age[page], page))
                kept = sorted({0, *newest, *others[: budget - 1 - len(newest)]}) if len(age) > budget else newest
                assert chosen[head].tolist() == kept
                gone.update((head, page) for page in age if page not in kept)
        else:
            chosen = [np.arange(own + 1)] * heads
        weights = [rng.random(len(pages)) for pages in chosen]
        memory.observe(weights)
        given.append({
            (head, page): weight
            for head in range(heads)
            for page, weight in zip(chosen[head].tolist(), weights[head].tolist(), strict=True)
        })  # fmt: skip


def test_nothing_is_made_up() -> None:
    """A step that does not go on where the last one has ended, or behind one that raised, is refused."""
    memory, make = SequenceMemory(), lambda: [Decay().begin(1)]
    with pytest.raises(DistKVError, match="at position 9 of a sequence of which the policy of attention remembers"):
        memory.begin(9, 8, make)
    memory.begin(3, 8, make)
    memory.end(12)
    with pytest.raises(DistKVError, match="remembers the tokens before position 12"):
        memory.begin(11, 8, make)
    before = memory.layers
    memory.begin(12, 8, make)
    assert memory.layers is before
    with pytest.raises(DistKVError, match="remembers nothing"):
        memory.begin(12, 8, make)
    memory.begin(8, 8, make)
    assert memory.layers is not before
