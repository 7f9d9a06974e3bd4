"""The sampler against its definition, written out plainly in numpy and float64."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompts import seeded
from support.sample_rows import GREEDY, PLAIN
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.workers.runners.host_copies import send
from distkv.workers.sampling.penalties import penalise, penalty_arrays
from distkv.workers.sampling.sample_row import SampleRow, uniform_number
from distkv.workers.sampling.sampler import sample

ALMOST_ONE = float(np.nextafter(1.0, 0.0))


def penalised(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    logits = logits.astype(np.float64)
    for token in {*row.prompt_token_ids, *row.output_token_ids}:
        logits[token] *= row.repetition_penalty if logits[token] < 0 else 1 / row.repetition_penalty
    for token in set(row.output_token_ids):
        count = row.output_token_ids.count(token)
        logits[token] -= row.presence_penalty + row.frequency_penalty * count
    return logits


def distribution(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    """The probability of each token: penalties, temperature, then min_p, top_k and top_p, each on what is left."""
    logits = penalised(logits, row)
    probs = np.exp((logits - logits.max()) / row.temperature)
    probs /= probs.sum()
    probs[probs < row.min_p * probs.max()] = 0
    likeliest = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if row.top_k > 0:
        probs[likeliest[row.top_k :]] = 0
    enough, mass = row.top_p * probs.sum(), 0.0
    for place, token in enumerate(likeliest):
        if row.top_p < 1 and place > 0 and mass >= enough:
            probs[token] = 0
        mass += probs[token]
    return probs / probs.sum()


def drawn(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return [token for token, _ in sample(logits, rows).result()]


def random_logits(seed: int, rows: int, vocab_size: int) -> Tensor:
    return torch.randn(rows, vocab_size, generator=seeded(seed)) * 2.5


@st.composite
def sample_rows(draw: st.DrawFn, vocab_size: int, temperatures: tuple[float, ...] = (0.2, 0.7, 1.0, 1.9)) -> SampleRow:
    """Any parameters, some of them off."""
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=12)
    return replace(
        PLAIN,
        temperature=draw(st.sampled_from(temperatures)),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.1])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, vocab_size, vocab_size + 3])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.03, 0.4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.8, 1.3, 2.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -1.5, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.3, 0.4])),
        uniform=draw(st.floats(0, ALMOST_ONE)),
        prompt_token_ids=[0, *draw(tokens)],
        output_token_ids=draw(tokens),
    )


@settings(max_examples=4 * settings().max_examples)
@given(st.data(), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_draws_have_the_defined_distribution(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """Over an even grid of uniforms each token comes up as often as its probability says, to within one draw."""
    logits, count = random_logits(seed, 1, vocab_size), 200
    row = data.draw(sample_rows(vocab_size))
    before = logits.clone()
    tokens = Counter(drawn(logits, [replace(row, uniform=(i + 0.5) / count) for i in range(count)]))
    assert torch.equal(logits, before)
    for token, probability in enumerate(distribution(logits[0].numpy(), row)):
        assert abs(tokens[token] - count * probability) <= 1 + 1e-3
        if probability == 0:
            assert tokens[token] == 0


@given(st.data(), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_greedy_takes_the_largest_penalised_logit(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """Truncation and the uniform mean nothing to it."""
    logits = random_logits(seed, 1, vocab_size)
    row = data.draw(sample_rows(vocab_size, temperatures=(0.0,)))
    assert drawn(logits, [row]) == [penalised(logits[0].numpy(), row).argmax()]


def test_filters_by_hand() -> None:
    """Each filter counts in what the ones before it left."""
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    cases = [
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_p": 0.45}, {1, 3}),
        ({"top_p": 0.35}, {1}),
        ({"top_p": 0.75}, {1, 2, 3}),
        ({"top_k": 2, "top_p": 0.5}, {1}),  # 0.4 / 0.7 is enough
        ({"min_p": 0.3}, {1, 2, 3}),  # 0.12 and more
        ({"min_p": 0.3, "top_p": 0.44}, {1}),  # 0.4 / 0.9 is enough
        ({"min_p": 0.6, "top_k": 3}, {1, 3}),
        ({"min_p": 0.6, "temperature": 0.5}, {1}),  # 0.09 is less than 0.6 * 0.16
        ({"top_p": 0.45, "temperature": 0.5}, {1}),  # 0.16 / 0.3 is enough
    ]
    for change, tokens in cases:
        rows = [replace(PLAIN, uniform=i / 100, **change) for i in range(100)]
        assert set(drawn(logits, rows)) == tokens, change


CHOICES = {
    "plain": PLAIN,
    "temperature": replace(PLAIN, temperature=0.6),
    "top_k": replace(PLAIN, top_k=4),
    "top_p": replace(PLAIN, top_p=0.8),
    "min_p": replace(PLAIN, min_p=0.1),
    "all": replace(PLAIN, temperature=1.4, top_k=9, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_draws_of_a_request_pass_a_chi_square_test(name: str) -> None:
    """With the uniforms that requests get, over positions, samples and seeds."""
    logits, count = random_logits(4, 1, 12), 6000
    expected = distribution(logits[0].numpy(), CHOICES[name]) * count
    for uniforms in (
        [uniform_number(11, 0, position) for position in range(count)],
        [uniform_number(11, index, 5) for index in range(count)],
        [uniform_number(seed, 0, 0) for seed in range(count)],
    ):
        tokens = drawn(logits, [replace(CHOICES[name], uniform=uniform) for uniform in uniforms])
        observed = np.bincount(tokens, minlength=12)
        assert not observed[expected == 0].any()
        kept = expected > 0
        statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
        assert statistic < 37.4  # 11 degrees of freedom: one in 10,000 is larger; fewer degrees are stricter


def test_uniform_draw() -> None:
    """A pure function into [0, 1), whose three arguments all matter; neighbours are not alike."""
    assert uniform_number(1, 2, 3) == uniform_number(1, 2, 3)
    arguments = [(seed, index, position) for seed in range(-4, 8) for index in range(8) for position in range(8)]
    arguments += [(2**63, 0, 0), (2**64 - 5, 0, 0), (0, 0, 2**40)]
    draws = [uniform_number(*each) for each in arguments]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    grid = np.array(draws[: 12 * 64]).reshape(12, 8, 8)
    for axis in range(3):
        ahead, behind = (
            np.take(grid, range(*ends), axis).ravel() for ends in ((1, grid.shape[axis]), (0, grid.shape[axis] - 1))
        )
        assert abs(np.corrcoef(ahead, behind)[0, 1]) < 0.15


@given(st.data(), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_a_draw_does_not_depend_on_its_batch(data: st.DataObject, count: int, seed: int) -> None:
    """Together, alone, or in another order, with other rows of logits around: the same tokens and log-probabilities."""
    vocab_size = data.draw(st.sampled_from([7, 300, 40_000]))
    logits = random_logits(seed, count, vocab_size)
    rows = [
        replace(
            data.draw(sample_rows(vocab_size, temperatures=(0.0, 0.5, 1.0, 3.0))),
            logits_row=data.draw(st.integers(0, count - 1)),
            num_logprobs=data.draw(st.sampled_from([None, 3])),
        )
        for _ in range(data.draw(st.integers(1, count + 2)))
    ]
    together = sample(logits, rows).result()
    alone = [sample(logits[row.logits_row :][:1], [replace(row, logits_row=0)]).result()[0] for row in rows]
    assert alone == together
    order = data.draw(st.permutations(range(len(rows))))
    assert sample(logits, [rows[i] for i in order]).result() == [together[i] for i in order]


@given(st.data(), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_logprobs(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """Of the model's own distribution, whatever the row does to it; the rank counts those that are likelier."""
    logits = random_logits(seed, 1, vocab_size)
    count = data.draw(st.integers(0, vocab_size + 2))
    row = replace(data.draw(sample_rows(vocab_size, temperatures=(0.0, 1.0))), num_logprobs=count)
    ((token, result),) = sample(logits, [row]).result()
    assert result is not None
    exact = logits[0].double().log_softmax(-1)
    ranked = exact.argsort(descending=True).tolist()
    assert result.logprob == pytest.approx(exact[token].item(), abs=1e-5)
    assert result.rank == ranked.index(token) + 1
    assert [top for top, _ in result.top] == ranked[:count]
    assert [value for _, value in result.top] == pytest.approx(exact[ranked[:count]].tolist(), abs=1e-5)


def test_no_logprobs_unless_asked() -> None:
    assert sample(random_logits(0, 1, 5), [GREEDY]).result()[0][1] is None


def test_ties() -> None:
    """Greedy takes the lowest id; so does top_k; equally likely tokens share a rank."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 3.0, 1.0]])
    assert drawn(logits, [GREEDY]) == [1]
    assert drawn(torch.zeros(1, 50_000), [GREEDY]) == [0]
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert drawn(logits, [replace(PLAIN, top_k=1, uniform=uniform)]) == [1]
        assert drawn(logits, [replace(PLAIN, top_k=2, uniform=uniform)])[0] in (1, 3)
    for wanted, rank in ((3, 1), (4, 1), (2, 4), (5, 4), (0, 6)):
        # a frequency penalty below zero makes the wanted token the drawn one
        row = replace(GREEDY, num_logprobs=1, frequency_penalty=-9.0, output_token_ids=[wanted])
        ((token, result),) = sample(logits, [row]).result()
        assert (token, result.rank) == (wanted, rank)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.1}])
def test_tiny_temperatures_are_greedy(temperature: float, truncation: dict[str, float]) -> None:
    logits = torch.tensor([[-1e4, 88.0, 3.0, 89.0, -3.0]])
    for uniform in (0.0, 0.5, 0.9999999999, ALMOST_ONE):
        assert drawn(logits, [replace(PLAIN, temperature=temperature, uniform=uniform, **truncation)]) == [3]


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-9, 0.01])
@pytest.mark.parametrize("top_k", [0, 5])
def test_tiny_top_p_keeps_the_likeliest(top_p: float, top_k: int) -> None:
    """Even where its product with the mass that is left is zero."""
    logits = torch.randn(1, 200, generator=seeded(1))
    best = int(logits.argmax())
    rows = [replace(PLAIN, top_p=top_p, top_k=top_k, uniform=u) for u in (0.0, 0.3, 0.9999999999, ALMOST_ONE)]
    assert drawn(logits, rows) == [best] * 4


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-300, 1 - 1e-10, ALMOST_ONE]), st.integers(3, 500))
def test_a_token_of_probability_zero_is_never_drawn(seed: int, uniform: float, vocab_size: int) -> None:
    """Not at either end of the interval, wherever the impossible tokens lie."""
    logits = random_logits(seed, 1, vocab_size)
    possible = torch.rand(vocab_size, generator=seeded(seed + 1)) < 0.3
    possible[seed % vocab_size] = True
    logits[0, ~possible] = -torch.inf
    for change in ({}, {"temperature": 0.05}, {"top_k": vocab_size}, {"top_k": 2}, {"top_p": 0.999}, {"min_p": 0.5}):
        row = replace(PLAIN, uniform=uniform, **change)
        (token,) = drawn(logits, [row])
        assert distribution(logits[0].numpy(), row)[token] > 0


def test_the_ends_of_the_interval() -> None:
    """Without truncation tokens lie in the order of their ids; with it, likeliest first."""
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    for change, first, last in (({}, 0, 2), ({"top_k": 3}, 1, 0)):
        rows = [replace(PLAIN, uniform=uniform, **change) for uniform in (0.0, 0.9999999999)]
        assert drawn(logits, rows) == [first, last]


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    cases = [
        ({"repetition_penalty": 4.0, "prompt_token_ids": [0]}, 2),  # 2 / 4 < 1
        ({"repetition_penalty": 4.0, "prompt_token_ids": [2], "output_token_ids": [0]}, 0),  # 0.5 ties with token 3
        ({"repetition_penalty": 0.1, "prompt_token_ids": [1, 2]}, 2),  # 1 / 0.1
        ({"presence_penalty": 1.1, "output_token_ids": [0, 0, 0]}, 2),  # once, however often
        ({"presence_penalty": 1.1, "prompt_token_ids": [0]}, 0),  # not for the prompt
        ({"frequency_penalty": 0.4, "output_token_ids": [0, 0]}, 0),  # 2 - 0.8 > 1
        ({"frequency_penalty": 0.4, "output_token_ids": [0, 0, 0]}, 2),  # 2 - 1.2 < 1
        ({"frequency_penalty": 0.4, "prompt_token_ids": [0, 0, 0]}, 0),
    ]
    for change, token in cases:
        assert drawn(logits, [replace(GREEDY, **change)]) == [token], change


def test_penalties_leave_other_rows_alone() -> None:
    """Two rows that draw from the same logits, and the logits themselves."""
    logits = torch.tensor([[2.0, 1.0]])
    harsh = replace(GREEDY, presence_penalty=9.0, output_token_ids=[0], num_logprobs=2)
    results = sample(logits, [harsh, replace(GREEDY, num_logprobs=2), harsh]).result()
    assert [token for token, _ in results] == [1, 0, 1]
    assert [result.rank for _, result in results] == [2, 1, 2]
    assert logits.tolist() == [[2.0, 1.0]]


@given(st.data(), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_a_late_token_counts_like_any_other(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """Penalties on an output whose newest token is still among the draws of the step before: bit for bit those with all
    of it on the host, whatever else that step drew."""
    count = data.draw(st.integers(1, 5))
    logits = random_logits(seed, count, vocab_size)
    rows = [
        replace(
            data.draw(sample_rows(vocab_size, temperatures=(0.0, 1.0))), logits_row=number,
            output_token_ids=data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6)),
            num_logprobs=vocab_size,
        )
        for number in range(count)
    ]  # fmt: skip
    numbers = data.draw(st.permutations(range(count + 2)))[:count]
    before = torch.randint(0, vocab_size, (count + 2,), generator=seeded(seed))
    before[numbers] = torch.tensor([row.output_token_ids[-1] for row in rows])
    late = [
        replace(row, output_token_ids=row.output_token_ids[:-1], pending=number)
        for row, number in zip(rows, numbers, strict=True)
    ]
    some = [data.draw(st.sampled_from(pair)) for pair in zip(rows, late, strict=True)]
    expected = adjusted(logits, rows, None)
    assert torch.equal(adjusted(logits, late, before), expected)
    assert torch.equal(adjusted(logits, some, before), expected)
    assert sample(logits, late, before).result() == sample(logits, rows).result()


def adjusted(logits: Tensor, rows: list[SampleRow], drawn: Tensor | None) -> Tensor:
    """The logits that rows draw from."""
    penalties = penalty_arrays(list(enumerate(rows)), logits.shape[1])
    changed = logits.clone()
    penalise(changed, send(penalties, CpuDevice()), drawn)
    return changed


@given(st.data(), st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_penalties_by_the_book(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """In float32 and in this order, one token after the other: an order of its own is part of what a draw is."""
    logits = random_logits(seed, 2, vocab_size)
    rows = [data.draw(sample_rows(vocab_size)) for _ in range(2)]
    expected = logits.clone()
    for values, row in zip(expected, rows, strict=True):
        for token in {*row.prompt_token_ids, *row.output_token_ids}:
            value = values[token]
            penalty = row.repetition_penalty
            values[token] = value / penalty if value > 0 else value * penalty
        for token, count in Counter(row.output_token_ids).items():
            times = torch.tensor(count, dtype=torch.float32)
            values[token] -= row.presence_penalty + row.frequency_penalty * times
    assert torch.equal(adjusted(logits, rows, None), expected)


@given(st.data(), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_logprobs_of_many_rows_are_those_of_each(data: st.DataObject, count: int, seed: int) -> None:
    """However many each row wants, with equal logits about: of those the lowest ids, whatever the others ask for."""
    vocab_size = data.draw(st.sampled_from([2, 9, 200, 5000]))
    logits = random_logits(seed, count, vocab_size).bfloat16().float()
    wanted = st.sampled_from([None, 0, 1, 3, 20, vocab_size + 1])
    rows = [replace(PLAIN, logits_row=n, uniform=0.1 * n, num_logprobs=data.draw(wanted)) for n in range(count)]
    for row, (token, table) in zip(rows, sample(logits, rows).result(), strict=True):
        [(alone, own)] = sample(logits[row.logits_row :][:1], [replace(row, logits_row=0)]).result()
        assert (token, table) == (alone, own)
        if row.num_logprobs is None:
            assert table is None
            continue
        assert table is not None
        logprobs = logits[row.logits_row].log_softmax(-1)
        ranked = logprobs.sort(descending=True, stable=True).indices.tolist()[: row.num_logprobs]
        assert table.top == [(one, logprobs[one].item()) for one in ranked]
        assert table.logprob == logprobs[token].item()
        assert table.rank == 1 + sum(value > table.logprob for value in logprobs.tolist())


def test_draws_may_be_read_again() -> None:
    draws = sample(random_logits(0, 2, 9), [replace(GREEDY, num_logprobs=2), replace(GREEDY, logits_row=1)])
    assert draws.result() == draws.result()
    assert draws.tokens.tolist() == [token for token, _ in draws.result()]


@given(st.lists(st.lists(st.integers(-(2**62), 2**62), max_size=5), max_size=4))
def test_parameters_arrive_as_they_are(numbers: list[list[int]]) -> None:
    arrays: list[np.ndarray] = []
    for one in numbers:
        arrays.append(np.array(one, dtype=np.int64))
        arrays.append(np.array([one, one], dtype=np.float64).T / 3)
    sent: list[Tensor] = send(arrays, CpuDevice())
    assert len(sent) == len(arrays)
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.shape == array.shape and (tensor.numpy() == array).all()
        assert tensor.numpy().dtype == array.dtype
