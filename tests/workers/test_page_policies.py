"""Policies of attention: what they choose, by which weights, and attention over what they have chosen."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attention_steps import Sequences
from support.measures import TOLERANCE, relative_error
from support.pages import store
from support.plans import sequence_step
from support.policy_steps import attend, on_demand
from support.prompts import seeded

from distkv.kernels.native import expected_weights as expected_weights_module
from distkv.kernels.native.expected_weights import expected_weights
from distkv.kernels.native.instruction_sets import INSTRUCTION_SETS
from distkv.kernels.native.library import Library, load, load_best
from distkv.storage.device import CpuDevice
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.pools.page_summaries import PageSummaries, mean_keys
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention.chosen_attention import covered
from distkv.workers.attention.policies.budget import highest
from distkv.workers.attention.policies.decay import Decay
from distkv.workers.attention.policies.policy import Choice, PagePolicy, Rows, name_of
from distkv.workers.attention.policies.registry import parse_policy
from distkv.workers.attention.policies.sink_window import SinkWindow
from distkv.workers.attention.policies.top_pages import TopPages
from distkv.workers.attention.summarising import Summarising
from distkv.workers.errors import ConfigError

LIBRARIES = [load(one) for one in INSTRUCTION_SETS if one.is_here]


# --- the text ---


@pytest.mark.parametrize(
    ("text", "policy", "name"),
    [
        ("full", None, ""),
        ("sink_window", SinkWindow(4, 4096), "sink_window(sinks=4, window=4096)"),
        (" sink_window( window=100,sinks=0 )", SinkWindow(0, 100), "sink_window(sinks=0, window=100)"),
        ("top_pages", TopPages(share=0.1), "top_pages(share=0.1)"),
        ("top_pages(share=1)", TopPages(share=1.0), "top_pages(share=1.0)"),
        ("top_pages(pages=64)", TopPages(pages=64), "top_pages(pages=64)"),
        ("decay", Decay(share=0.1), "decay(share=0.1, half_life=16.0)"),
        ("decay(pages=8, half_life=3)", Decay(pages=8, half_life=3.0), "decay(pages=8, half_life=3.0)"),
    ],
)
def test_a_policy_is_read_and_named(text: str, policy: PagePolicy | None, name: str) -> None:
    assert parse_policy(text) == policy
    if policy is not None:
        assert name_of(policy) == name and parse_policy(name) == policy


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "best_pages",
            r"is none of full, sink_window\(sinks, window\), top_pages\(share, pages\), decay\(share, pages",
        ),
        ("decay(half_life=0)", "half_life is 0; use a number of tokens above 0"),
        ("decay(half_life=1e999)", "half_life is inf; use a number of tokens above 0, at most 2147483647"),
        (f"decay(half_life=1{400 * '0'})", "0; use a number of tokens above 0"),
        ("decay(pages=1)", "decay: pages is 1; use a whole number, 2 or more"),
        ("top_pages(", "use one of full"),
        ("", "use one of full"),
        ("full(x=1)", "full has no options"),
        ("top_pages(0.1)", r"a value that has no name; use top_pages\(share, pages\)"),
        ("top_pages(k=3)", r"no option k; use top_pages\(share, pages\)"),
        ("top_pages(share=print)", "share must be a number"),
        ("top_pages(share=0)", "share is 0; use a number above 0 and at most 1"),
        ("top_pages(share=0.1, pages=2)", "both given; leave one of them out"),
        ("top_pages(pages=1)", "pages is 1; use a whole number, 2 or more"),
        ("sink_window(window=0)", "window is 0; use a whole number, 1 or more"),
        (f"sink_window(window={2**63})", f"window is {2**63}; use at most {2**31 - 1}"),
        ("top_pages(share=0.1, share=0.2)", "sets share twice; leave one of them out"),
        ("top_pages(**{'share': 1})", "no option {'share': 1}; use top_pages"),
    ],
)
def test_a_text_that_is_no_policy_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_policy(text)


# --- what is chosen ---


def rows_of(positions: list[int], page_size: int, weights: np.ndarray | None = None, kv_heads: int = 1) -> Rows:
    unused: Any = None
    return Rows(np.array(positions), page_size, kv_heads, unused, unused, lambda: weights)  # type: ignore[arg-type, return-value]


@given(st.integers(0, 400), st.integers(0, 70), st.integers(1, 300), st.sampled_from([16, 64]))
def test_a_window_is_rounded_up_to_pages(position: int, sinks: int, window: int, page_size: int) -> None:
    policy = SinkWindow(sinks, window)
    tokens = [token for token in range(position + 1) if token < sinks or token > position - window]
    expected = sorted({token // page_size for token in tokens})
    [[first, second]] = policy.choose(rows_of([position], page_size, kv_heads=2))
    assert first.tolist() == second.tolist() == expected
    assert len(expected) <= policy.num_chosen(position // page_size + 1, page_size)


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.5, 3.0]), min_size=1, max_size=40), st.integers(0, 40))
def test_the_highest_are_chosen_and_of_equal_ones_the_first(numbers: list[float], count: int) -> None:
    count = min(count, len(numbers))
    expected = sorted(sorted(range(len(numbers)), key=lambda index: (-numbers[index], index))[:count])
    assert highest(np.array(numbers, dtype=np.float32), count).tolist() == expected


def test_the_first_page_and_the_own_one_are_always_among_the_top() -> None:
    weights = np.array([[[0, 5, 9, 7, 1, 8, 99]], [[0, 1, 2, 3, 4, 5, 0]]], dtype=np.float32)
    rows = rows_of([16 * 5 + 3, 16 * 6], 16, weights)
    assert [[pages.tolist() for pages in row] for row in TopPages(pages=3).choose(rows)] == [[[0, 2, 5]], [[0, 5, 6]]]
    assert [row[0].tolist() for row in TopPages(pages=2).choose(rows)] == [[0, 5], [0, 6]]
    assert [len(row[0]) for row in TopPages(share=0.5).choose(rows)] == [3, 4], "rounded up"
    assert [row[0].tolist() for row in TopPages(share=1).choose(rows)] == [[*range(6)], [*range(7)]]
    assert TopPages(share=0.1).num_chosen(30, 16) == 3 and TopPages(share=0.1).num_chosen(31, 16) == 4


@given(
    st.sampled_from(LIBRARIES), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**32 - 1), st.integers(1, 6),
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 16, 24, 64, 80]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_expected_weights(
    library: Library, dtype: torch.dtype, seed: int, rows: int, kv_heads: int, group: int, dim: int, blocks: int
) -> None:
    """They are softmax over means of 16 keys; a row has the same bits whatever rows and pages are beside its own."""
    generator, pages = seeded(seed), 40
    keys = torch.randn(pages, kv_heads, 16 * blocks, dim, generator=generator).to(dtype)
    q = (4 * torch.randn(rows, kv_heads * group, dim, generator=generator)).to(dtype)
    spec = PageSpec(1, kv_heads, 16 * blocks, dim, str(dtype).removeprefix("torch."))
    summaries, ids = PageSummaries(spec, CpuDevice(), 9), np.random.default_rng(seed).permutation(2 * pages)[:pages]
    summaries.put(0, ids, keys)
    means = summaries.layer(0)
    exact = keys.double().unflatten(2, (blocks, 16)).mean(3).transpose(1, 2)
    assert relative_error(means[ids], exact) < TOLERANCE[dtype]
    counts = np.random.default_rng(seed).integers(0, pages + 1, rows)
    with pytest.MonkeyPatch.context() as patch:  # some rows at a time
        patch.setattr(expected_weights_module, "MOST_SCORES", 2 * kv_heads * group * pages * blocks)
        weights = expected_weights(library, q, means, ids, counts)
    q_RKGD = q.unflatten(1, (kv_heads, group)).double()
    scores = torch.einsum("rkgd,pbkd->rkgpb", q_RKGD, means[ids].double()) * dim**-0.5
    for row, count in enumerate(counts.tolist()):
        expected = scores[row, :, :, :count].flatten(2).softmax(-1).unflatten(2, (-1, blocks)).sum((1, 3)).numpy()
        assert weights[row, :, :count] == pytest.approx(expected, rel=1e-4, abs=1e-30)
        alone = expected_weights(library, q[row : row + 1], means, ids[:count], counts[row : row + 1])
        assert np.array_equal(alone[0], weights[row, :, :count])


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(TOLERANCE)), st.sampled_from([16, 64, 256]))
def test_a_mean_key_has_the_same_bits_whatever_is_beside_it(seed: int, dtype: torch.dtype, page_size: int) -> None:
    keys = torch.randn(5, 2, page_size, 24, generator=seeded(seed)).to(dtype)
    together = mean_keys(keys)
    for page, alone in enumerate(keys.split(1)):
        assert torch.equal(together[page], mean_keys(alone)[0])


def test_what_could_not_be_read_has_no_summary() -> None:
    """Until it is read again: `forget` is for ids that name other pages."""
    spec, unreadable = PageSpec(1, 2, 16, 4, "float32"), encode_location(Tier.HOST, 0)
    summaries, host = PageSummaries(spec, CpuDevice(), 1), HostPool(spec, 1, pinned=False)
    store(host, 0, torch.randn(1, 2, 2, 16, 4))
    step = replace(sequence_step([7], 40, [unreadable, 0, 1], 20, 1), page_ids=np.array([5, 3, 4]))
    pool = torch.randn(2, 2, 2, 16, 4)
    for reason in ({0: "damaged"}, {}):
        assert summaries.unknown(np.array([5, 3, 4])).tolist() == [True, True, True]
        summarising, stream = Summarising(summaries, [step], [step], 16), on_demand(spec, host, 1)
        summarising.fill(0, pool, stream)
        stream.bad_reads |= reason
        summarising.end(stream)
    assert summaries.unknown(np.array([5, 3, 4])).tolist() == [False, False, True], "the last one is not full"
    assert torch.equal(summaries.layer(0)[5], mean_keys(host.page(0)[:, 0])[0])
    assert torch.equal(summaries.layer(0)[3], mean_keys(pool[0, :1])[0])
    summaries.forget([3, 17])
    assert summaries.unknown(np.array([5, 3])).tolist() == [False, True]


# --- attention over it ---


class SomePages:
    """Chooses by a generator, other pages for each row, KV head and layer."""

    needs_summaries, looks_at_queries = False, True

    def __init__(self, seed: int):
        self.random, self.chosen = np.random.default_rng(seed), []

    def choose(self, rows: Rows) -> Choice:
        choice = [
            [np.flatnonzero([*(self.random.random(own) < 0.5), True]) for _ in range(rows.num_kv_heads)]
            for own in rows.own_pages.tolist()
        ]
        self.chosen += choice
        return choice

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        return num_pages


def test_numbers_that_are_not_finite_spoil_no_sum_of_what_is_covered() -> None:
    chosen = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])
    everything = torch.tensor([[2.0, 1.0], [1.0, 0.0]])
    assert covered(chosen.double(), everything.double()).tolist() == [0.5, 1.0]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=3), st.integers(1, 3),
    st.integers(1, 3), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_tokens_attend_to_what_they_have_chosen(
    lengths: list[tuple[int, int]], kv_heads: int, group: int, dtype: torch.dtype, seed: int, cold: float
) -> None:
    """Against float64 over the chosen pages of each token and KV head, through a buffer of one page at a time."""
    s = Sequences(lengths, [2] * len(lengths), kv_heads=kv_heads, group=group, dtype=dtype, seed=seed)
    policy = SomePages(seed)
    out, step, counts = attend(policy, s, [0] * len(lengths), cold)
    visible = masses = 0.0
    positions = [(i, start + n) for i, (start, count) in enumerate(lengths) for n in range(count)]
    for row, ((sequence, position), choice) in enumerate(zip(positions, policy.chosen, strict=True)):
        slots = step.steps[sequence].pages
        for head, pages in enumerate(choice):
            visible += position // 16 + 1
            tokens = (pages[:, None] * 16 + np.arange(16)).reshape(-1)
            seen = tokens[tokens <= position]
            keys, values = step.pool[:, slots[seen // 16], head, seen % 16].double()
            q = step.q[row].unflatten(0, (kv_heads, group))[head].double()
            scores = q @ keys.T * s.head_dim**-0.5
            tokens = np.arange(position + 1)
            every = q @ step.pool[0, slots[tokens // 16], head, tokens % 16].double().T * s.head_dim**-0.5
            masses += float((scores.logsumexp(-1) - every.logsumexp(-1)).exp().sum())
            weights = scores.softmax(-1)
            found = out[row].view(kv_heads, group, -1)[head]
            assert relative_error(found, weights @ values) < TOLERANCE[dtype]
    assert counts["pages_visible"] == visible
    assert counts["pages_chosen"] == sum(len(pages) for choice in policy.chosen for pages in choice)
    assert counts["num_audited"] == len(positions) * kv_heads * group
    assert counts["mass_covered"] == pytest.approx(masses, rel=TOLERANCE[dtype])


@given(st.data())
def test_all_pages_give_the_bits_of_full_attention(data: st.DataObject) -> None:
    """Some rows in the prompt, some behind it; resident, cold, and in loads of any size."""
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 30)), min_size=1, max_size=3))
    s = Sequences(
        lengths, [3] * len(lengths), kv_heads=data.draw(st.integers(1, 3)), group=data.draw(st.integers(1, 4)),
        head_dim=data.draw(st.sampled_from([16, 24, 64])), dtype=data.draw(st.sampled_from(list(TOLERANCE))),
        seed=data.draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip
    full, _, counts = attend(SinkWindow(), s, [10_000] * len(lengths))
    assert not counts
    middle = [start + count // 2 for start, count in lengths]
    is_cold = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    if is_cold:
        middle = [start for start, _ in lengths]  # rows of prompts would have loads of their own
    found, _, _ = attend(SinkWindow(window=10_000), s, middle, is_cold, data.draw(st.integers(1, 4)))
    assert torch.equal(found, full)


def test_a_needle_is_found(set_threads: Callable[[int], None]) -> None:
    """A page has a key that is much like the query of one KV head's group: that head chooses it, on any threads."""
    generator, dim = seeded(0), 64
    keys = torch.randn(100, 2, 16, dim, generator=generator)
    q = torch.randn(1, 4, dim, generator=generator)
    keys[37, 1, 5] = 30 * q[0, 3]
    spec, ids = PageSpec(1, 2, 16, dim, "bfloat16"), np.arange(100)
    summaries = PageSummaries(spec, CpuDevice(), 100)
    summaries.put(0, ids, keys.bfloat16())
    weights = partial(expected_weights, load_best(), q.bfloat16(), summaries.layer(0), ids, np.array([99]))
    rows = replace(rows_of([1599], 16, kv_heads=2), expected_weights=weights)
    chosen = []
    for threads in (1, 2):
        set_threads(threads)
        [[other, found]] = TopPages(pages=3).choose(rows)
        chosen.append((other.tolist(), found.tolist()))
    assert chosen[0] == chosen[1] and chosen[0][1] == [0, 37, 99] != chosen[0][0]
