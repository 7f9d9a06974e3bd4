"""Logits that are no numbers to choose by: told with the tokens, row by row."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from support.prompts import seeded
from support.sample_rows import GREEDY, PLAIN

from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import NO_TOKEN
from distkv.workers.sampling.sampler import sample

ROWS = {
    "greedy": GREEDY,
    "plain": PLAIN,
    "min_p": replace(PLAIN, min_p=0.2),
    "top_k": replace(PLAIN, top_k=3),
    "top_p": replace(PLAIN, top_p=0.9, temperature=5e-324),
    "penalised": replace(GREEDY, repetition_penalty=1.3, prompt_token_ids=[3], output_token_ids=[1, 1]),
}
VOCAB = 70  # longer than a vector of the CPU, and no multiple of one


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("value", [nan, inf, -nan])
def test_one_such_logit_anywhere_is_told(row: SampleRow, value: float) -> None:
    """And the others are sampled as ever, with log-probabilities or without."""
    good = torch.randn(1, VOCAB, generator=seeded(1)) * 3
    logits = good.repeat(VOCAB + 1, 1)
    logits[range(VOCAB), range(VOCAB)] = value
    for num_logprobs in (None, 4):
        one = replace(row, num_logprobs=num_logprobs)
        found = sample(logits, [replace(one, logits_row=number) for number in range(VOCAB + 1)])
        assert [token for token, _ in found.result()] == [NO_TOKEN] * VOCAB + [sample(good, [row]).result()[0][0]]
        assert found.result()[-1] == sample(good, [one]).result()[0]
        assert ((found.tokens >= 0) & (found.tokens < VOCAB)).all(), "the step after may run them"


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_row_of_minus_infinity_is_told(row: SampleRow) -> None:
    """While one number in it is enough to choose."""
    logits = torch.full((2, VOCAB), -inf)
    logits[1, 40] = -3e38
    assert [token for token, _ in sample(logits, [row, replace(row, logits_row=1)]).result()] == [NO_TOKEN, 40]


@pytest.mark.parametrize("row", [GREEDY, PLAIN, replace(PLAIN, top_k=2)])
@pytest.mark.parametrize("penalty", [1e-50, 1e-39])
def test_penalties_that_leave_no_number(row: SampleRow, penalty: float) -> None:
    """Of the row that has them; it may share its logits with others."""
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0]])
    harsh = replace(row, repetition_penalty=penalty, prompt_token_ids=[3])
    (token, _), (other, _) = sample(logits, [harsh, replace(row, num_logprobs=1)]).result()
    assert token == NO_TOKEN and 0 <= other < 4
