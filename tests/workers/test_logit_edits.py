"""What parameters make of logits, against the processors of transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.memory import engine_info
from support.prompts import seeded
from support.sample_rows import GREEDY, PLAIN
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from distkv import SamplingParams
from distkv.engine.protocol import EngineRequest
from distkv.engine.token_rules import make_rules
from distkv.storage.device import CpuDevice
from distkv.workers.runners.host_copies import send
from distkv.workers.sampling.logit_edits import edit, edit_arrays
from distkv.workers.sampling.row_edits import RowEdits
from distkv.workers.sampling.sampled_token import NO_TOKEN
from distkv.workers.sampling.sampler import sample

EOS = 2
PROMPT = [7, 8, 9]


def request_of(bad_words: list[list[int]], **params: Any) -> EngineRequest:
    ends = frozenset({EOS})
    return EngineRequest(
        "0", PROMPT, SamplingParams(**params), 99, seed=0, stop_token_ids=ends, bad_words_token_ids=bad_words
    )


def edits_of(request: EngineRequest, output: list[int], vocab_size: int, pending: bool) -> tuple[RowEdits, int | None]:
    """The edits of the row behind these tokens, of which the last one may be the second that a step has sampled."""
    rules = make_rules(request, engine_info(vocab_size=vocab_size))
    assert rules is not None
    known = PROMPT + (output[:-1] if pending else output)
    return rules.edits(known[len(PROMPT) :], pending), 1 if pending else None


def edited(logits: Tensor, rows: list[tuple[RowEdits, int | None]], sampled: Tensor) -> Tensor:
    arrays = edit_arrays([(index, row, pending) for index, (row, pending) in enumerate(rows)], logits.shape[1])
    result = logits.clone()
    edit(result, send(arrays, CpuDevice()), sampled)
    return result


@st.composite
def cases(draw: st.DrawFn, vocab_size: int) -> tuple[list[int], dict[str, Any], list[list[int]]]:
    """Tokens of an answer, parameters and bad words."""
    few = st.integers(3, min(6, vocab_size - 1))  # so that words come up
    token = st.integers(0, vocab_size - 1)
    words = draw(st.lists(st.lists(few, min_size=1, max_size=4), max_size=6, unique_by=tuple))
    params: dict[str, Any] = {}
    if draw(st.booleans()):
        params["min_tokens"] = draw(st.integers(1, 8))
    if draw(st.booleans()):
        params["logit_bias"] = draw(st.dictionaries(token, st.floats(-100, 100, width=32), min_size=1, max_size=5))
    if draw(st.booleans()) or not (words or params):
        params["allowed_token_ids"] = draw(st.lists(token, min_size=1, max_size=vocab_size))
    return draw(st.lists(few, min_size=1, max_size=8)), params, words


@given(st.data(), st.sampled_from([8, 63, 64, 65, 130]), st.booleans(), st.integers(0, 2**32 - 1))
def test_logits_are_those_of_transformers(data: st.DataObject, vocab_size: int, pending: bool, seed: int) -> None:
    """With the newest token known, and with it pending; whatever stands in the rows beside it."""
    made = data.draw(st.lists(cases(vocab_size), min_size=1, max_size=4))
    logits = torch.randn(len(made), vocab_size, generator=seeded(seed))
    rows = [
        edits_of(request_of(words, max_tokens=None, **params), output, vocab_size, pending)
        for output, params, words in made
    ]
    for index, (output, params, words) in enumerate(made):
        processors = LogitsProcessorList()
        if "logit_bias" in params:
            bias = [[[token], value] for token, value in params["logit_bias"].items()]
            processors.append(SequenceBiasLogitsProcessor(bias))
        if "min_tokens" in params:
            processors.append(MinNewTokensLengthLogitsProcessor(0, params["min_tokens"], EOS))
        if words:
            processors.append(NoBadWordsLogitsProcessor(words))
        if "allowed_token_ids" in params:
            others = sorted(set(range(vocab_size)) - set(params["allowed_token_ids"]))
            processors.append(SuppressTokensLogitsProcessor(others))
        expected = processors(torch.tensor([output]), logits[index : index + 1].clone())
        sampled = torch.tensor([0, output[-1]])  # a row's newest token is the second
        own = edited(logits[index : index + 1], [rows[index]], sampled)
        assert torch.equal(own, expected)
    if not pending:  # else each has a token of its own, and one tensor holds them all
        assert torch.equal(edited(logits, rows, torch.tensor([0, 0])), torch.cat(
            [edited(logits[index : index + 1], [row], torch.tensor([0, 0])) for index, row in enumerate(rows)]
        ))  # fmt: skip


def test_rows_without_edits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 20, generator=seeded(0))
    likeliest = logits.argmax(-1).tolist()
    barred = RowEdits(forbidden=[likeliest[1]])
    rows = [replace(GREEDY, logits_row=0), replace(GREEDY, logits_row=1, edits=barred), replace(GREEDY, logits_row=2)]
    before = logits.clone()
    found = [token for token, _ in sample(logits, rows).result()]
    assert [found[0], found[2]] == [likeliest[0], likeliest[2]] and found[1] == logits[1].topk(2).indices[1]
    assert torch.equal(logits, before)


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = torch.randn(1, 20, generator=seeded(0))
    row = replace(PLAIN, edits=RowEdits(biases={3: 100.0}), num_logprobs=0)
    [(token, found)] = sample(logits, [row]).result()
    assert token == 3 and found is not None
    assert found.logprob == pytest.approx(logits.log_softmax(-1)[0, 3].item())


@pytest.mark.parametrize("row", [GREEDY, PLAIN, replace(PLAIN, top_k=3)], ids=["greedy", "plain", "truncated"])
def test_a_row_that_leaves_no_token_gets_none(row: Any) -> None:
    logits = torch.randn(2, 20, generator=seeded(0))
    nothing = RowEdits(forbidden=list(range(20)))
    [(token, _), (other, _)] = sample(logits, [replace(row, edits=nothing), replace(row, logits_row=1)]).result()
    assert token == NO_TOKEN and other != NO_TOKEN


def test_penalties_come_behind_a_bias() -> None:
    """As in vLLM."""
    logits = torch.tensor([[1.0, 3.0, 0.0]])
    row = replace(GREEDY, repetition_penalty=2.0, output_token_ids=[0], edits=RowEdits(biases={0: 4.0}))
    assert [token for token, _ in sample(logits, [row]).result()] == [1]  # 5 / 2 is less than 3
