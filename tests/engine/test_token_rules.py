"""Whole models whose answers keep to rules: the same tokens whatever runs beside them and wherever pages lie."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.llms import tiered
from support.prompts import random_prompt
from support.rules import REGEX, VOCAB_SIZE, rule_requests, save_speaking_llama

from distkv import LLM, RequestError, SamplingParams, StructuredOutputsParams
from distkv.outputs import RequestOutput


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking_llama(tmp_path_factory.mktemp("model"))


def bad_words_of(llm: LLM, prompt: list[int]) -> list[str]:
    """Words of which the greedy answer to a prompt is full: pairs of its tokens that come out as themselves."""
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    tokens, tokenizer = output.outputs[0].token_ids, llm.tokenizer
    pairs = [list(pair) for pair in pairwise(tokens)]
    found = [tokenizer.decode(pair) for pair in pairs if tokenizer.encode(tokenizer.decode(pair) or "a") == pair]
    return [word for word in found if word.strip()]


def said(output: RequestOutput) -> list[Any]:
    return [
        output.prompt_logprobs,
        *[(one.token_ids, one.text, one.logprobs, one.finish_reason) for one in output.outputs],
    ]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[Any]]:
    """What each request says with all pages resident and nothing beside it."""
    with LLM(folder, page_size=16, device_kv_bytes="16MiB", enable_prefix_caching=False) as llm:
        return [said(llm.generate([prompt], one, use_tqdm=False)[0]) for prompt, one in rule_requests()]


def test_answers_keep_to_their_rules(folder: Path, alone: list[list[Any]]) -> None:
    person, regex, choice, anything, long, words, few, *_ = [answers for _, *answers in alone]
    [(_, text, _, reason)] = person
    assert reason == "length" or set(json.loads(text)) == {"name", "age"}
    [(_, text, _, reason)] = regex
    assert reason == "length" or re.fullmatch(REGEX, text)
    assert [reason for *_, reason in choice] == ["stop"] * 3
    assert {text for _, text, _, _ in choice} <= {"Hello", "Hello world", "漢"}
    for _, text, _, reason in anything:
        assert text.lstrip().startswith("{") and (reason == "length" or isinstance(json.loads(text), dict))
    [(tokens, *_)] = long
    assert len(tokens) > 20 and not set(tokens[:20]) & set(range(200))
    for tokens, *_ in words:
        assert not {64, 65} & set(tokens) and 66 in tokens
    [(tokens, *_)] = few
    assert set(tokens) == {3, 5, 7, 289}


@pytest.mark.parametrize("pages", [(60, 0, 0), (14, 40, 0), (14, 14, 60)], ids=["resident", "host", "disk"])
def test_answers_do_not_depend_on_what_else_happens(
    folder: Path, tmp_path: Path, alone: list[list[Any]], pages: tuple[int, int, int]
) -> None:
    """Together, through small windows, in small chunks, and once more with their prefixes cached."""
    prompts, params = map(list, zip(*rule_requests(), strict=True))
    with tiered(folder, pages, tmp_path, max_num_seqs=8) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [said(output) for output in outputs] == alone
        assert any(output.num_cached_tokens for output in outputs)
        assert not any(output.num_cached_tokens for output in outputs if output.prompt_logprobs)


def test_answers_that_are_preempted_go_on_in_their_grammar(folder: Path, alone: list[list[Any]]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="[ab]{600}"), max_tokens=None, seed=1)
    prompts = [random_prompt(20, number, VOCAB_SIZE) for number in range(3)]
    options: dict[str, Any] = {"max_model_len": 700, "page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    with LLM(folder, device_kv_bytes="16MiB", **options) as llm:
        expected = [said(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    with tiered(folder, (50, 0, 0), **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats().num_preemptions > 0
    assert [said(output) for output in outputs] == expected
    assert all(re.fullmatch("[ab]{600}", output.outputs[0].text) for output in outputs)


def test_bad_words_are_kept_out_of_what_would_be_said(folder: Path) -> None:
    """Pairs of tokens, of which the first one is not known when the second is masked."""
    prompt = random_prompt(9, 3, VOCAB_SIZE)
    with LLM(folder, device_kv_bytes="4MiB") as llm:
        words = bad_words_of(llm, prompt)
        assert words
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, bad_words=words)
        tokens = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
        assert not set(pairwise(tokens)) & {tuple(llm.tokenizer.encode(word)) for word in words}


def test_rules_that_leave_no_token_end_their_request_alone(folder: Path) -> None:
    contrary = SamplingParams(structured_outputs=StructuredOutputsParams(regex="abab"), bad_words=["a"])
    with LLM(folder, device_kv_bytes="4MiB") as llm:
        first, other = llm.generate(
            [[5], [6]], [contrary, SamplingParams(max_tokens=3, ignore_eos=True)], use_tqdm=False
        )
        assert isinstance(first.error, RequestError) and first.outputs[0].finish_reason == "error"
        assert "bad_words and structured_outputs leave no token that may come next" in str(first.error)
        assert other.error is None and len(other.outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allowed_token_ids": [1, 290]}, "allowed_token_ids has 290; ids are integers below 290"),
        ({"logit_bias": {"1": 1, 300: 1}}, "logit_bias has 300; ids are integers below 290"),
        ({"structured_outputs": StructuredOutputsParams(regex="(")}, "structured_outputs cannot be used"),
    ],
)
def test_what_the_model_cannot_do_is_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    with LLM(folder, device_kv_bytes="4MiB") as llm, pytest.raises(RequestError, match=message):
        llm.generate([[5]], SamplingParams(**values), use_tqdm=False)
