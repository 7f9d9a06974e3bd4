"""What a request may be given as, what ends its answers, and that every refusal is a RequestError."""

import asyncio
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted_engine import ScriptedEngine
from support.tokenizers import save_tokenizer

import distkv.frontend.front_end
from distkv import LLM, AsyncLLM, CapacityError, CompletionOutput, RequestError, RequestOutputKind, SamplingParams
from distkv.frontend.end_tokens import stop_reasons
from distkv.frontend.tokenizer import Tokenizer

PENALTIES = ["repetition_penalty", "presence_penalty", "frequency_penalty"]
NUMBERS = [*PENALTIES, "n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "logprobs"]
NUMBERS += ["prompt_logprobs", "min_tokens"]
FLAGS = ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"]
LISTS = ["stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias"]
OTHERS = [*FLAGS, *LISTS, "structured_outputs", "output_kind"]


class Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError

    def tolist(self) -> None:
        raise ZeroDivisionError


ANYTHING: Any = (
    st.sampled_from(
        [None, True, math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, 2**63, -(2**63), 1e308,
         Fraction(1, 3), "1", "a\udcff", ["a\udcff"], b"1", [], [1], {}, {1}, 1j, object(), Unprintable(), int,
         np.bool_(True), np.array([1]),
         np.array([]), np.array("x"), np.float16("nan"), torch.tensor(True), torch.tensor([1, 2]), [10**5000],
         ["x" * 10**5], [[1]]]
    )
    | st.integers()
    | st.floats()
    | st.floats(width=32).map(np.float32)
    | st.integers(-(2**31), 2**31 - 1).map(np.int32)
    | st.floats(width=32).map(torch.tensor)
    | st.integers(-9, 99).map(torch.tensor)
)  # fmt: skip


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*NUMBERS, *OTHERS], ANYTHING)))
def test_any_values_are_taken_as_plain_ones_or_refused_by_name(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except RequestError as error:
        text = str(error)
        assert any(text.startswith(f"{name} ") for name in values)
        assert len(text) < 400 and "must be" in text
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
        for name in NUMBERS:
            value = getattr(params, name)
            assert type(value) in (int, float, type(None)) and (value is None or math.isfinite(value))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, np.array])
def test_numbers_of_numpy_and_torch_are_taken(name: str, kind: Any) -> None:
    params = SamplingParams(**{name: kind(1)})
    assert getattr(params, name) == 1 and type(getattr(params, name)) is int


def test_floats_and_lists_of_numpy_and_torch_are_taken() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_p=torch.tensor(0.5),
        stop=np.array(["a", "b"]),
        stop_token_ids=np.array([3, 4]),
        ignore_eos=np.bool_(True),
        bad_words=np.array(["a"]),
        allowed_token_ids=np.array([5, 6]),
        logit_bias={np.int64(5): np.float32(0.5), "6": 1},
    )
    assert (params.bad_words, params.allowed_token_ids) == (["a"], [5, 6])
    assert params.logit_bias == {5: 0.5, 6: 1.0} and {type(token) for token in params.logit_bias} == {int}
    assert (params.temperature, params.top_p, params.stop, params.stop_token_ids) == (0.5, 0.5, ["a", "b"], [3, 4])
    assert params.ignore_eos is True
    assert SamplingParams(stop=("a",), stop_token_ids=(np.int64(3), 4)).stop_token_ids == [3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 10**400}, r"^temperature is 1000.*\.\.\..*000; it must be a finite number of at least 0$"),
        ({"temperature": math.inf}, "^temperature is inf; it must be a finite number of at least 0$"),
        ({"repetition_penalty": math.nan}, "^repetition_penalty is nan; it must be a finite number above 0$"),
        ({"seed": 10**5000}, "^seed is an unprintable int; it must be an integer from"),
        ({"ignore_eos": "no"}, "^ignore_eos is 'no'; it must be True or False$"),
        ({"stop": ["x"] * 10**6}, "^stop has 1000000 strings; it must be 256 at most$"),
        ({"stop": "x" * 10**6}, None),
        ({"allowed_token_ids": []}, r"^allowed_token_ids is \[\]; it must be a list of one token id at least$"),
        ({"allowed_token_ids": [-1]}, "^allowed_token_ids is -1; it must be an integer from 0"),
        ({"bad_words": "ab"}, "^bad_words is 'ab'; it must be a list of strings, none of them blank$"),
        ({"bad_words": ["a", " "]}, "none of them blank$"),
        ({"bad_words": ["x"] * 5000}, "^bad_words has 5000 strings; it must be 4096 at most$"),
        ({"logit_bias": [5]}, r"^logit_bias is \[5\]; it must be a dict from token ids to numbers$"),
        ({"logit_bias": {5: 101}}, "^logit_bias is 101; it must be a number of at least -100.0 and at most 100.0$"),
        ({"logit_bias": {"a": 1}}, "^logit_bias is 'a'; it must be an integer from 0"),
        ({"min_tokens": 17}, "^min_tokens is 17; it must be max_tokens, 16, at most$"),
        ({"spaces_between_special_tokens": False}, "^spaces_between_special_tokens is False; it must be left out: "),
        ({"skip_special_tokens": 1}, "^skip_special_tokens is 1; it must be True or False$"),
    ],
)
def test_a_refusal_says_what_is_meant_and_is_short(values: dict[str, Any], message: str | None) -> None:
    if message is None:
        SamplingParams(**values)
        return
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model"))


def scripted(folder: Path, script: list[str], ends: list[str], patch: pytest.MonkeyPatch) -> tuple[LLM, ScriptedEngine]:
    """An LLM that answers with these tokens; `ends` are the end tokens of config and generation config."""
    vocabulary = Tokenizer(folder)._tokenizer.get_vocab()
    engine = ScriptedEngine([vocabulary[one] for one in script], tuple(vocabulary[one] for one in ends))
    patch.setattr(distkv.frontend.front_end, "launch", lambda config, check: engine)
    return LLM(folder), engine


SCRIPT = ["▁Hello", "<special>", "▁the", "</s>", "▁world", "<s>", "."]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        llm, _ = scripted(folder, SCRIPT, ["<s>"], patch)
        with llm:
            yield llm


def answer(llm: LLM, **params: Any) -> CompletionOutput:
    [output] = llm.generate([[5]], SamplingParams(max_tokens=50, **params), use_tqdm=False)
    return output.outputs[0]


def ended(one: CompletionOutput) -> tuple[str, int, str | None, int | str | None]:
    return one.text, len(one.token_ids), one.finish_reason, one.stop_reason


def test_every_end_token_of_the_model_ends_an_answer(llm: LLM) -> None:
    """The tokenizer's own as well as those of config and generation config."""
    assert ended(answer(llm)) == (" Hello the", 4, "stop", None)
    assert len(llm.info.eos_token_ids) == 2
    assert ended(answer(llm, ignore_eos=True)) == (" Hello the world.", 7, "length", None)


def test_without_the_tokenizers_own_the_others_still_end_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = scripted(folder, ["▁the", "<s>", "▁world"], ["<s>"], monkeypatch)
    with llm:
        assert ended(answer(llm)) == (" the", 2, "stop", None)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"stop": "<special>"}, (" Hello", 2, "stop", "<special>")),
        ({"stop": "<special>\n"}, (" Hello", 2, "stop", "<special>\n")),
        ({"stop": ["nope", "<s>"], "ignore_eos": True}, (" Hello the world", 6, "stop", "<s>")),
        ({"stop": "</s>"}, (" Hello the", 4, "stop", None)),
        ({"stop_token_ids": [274]}, (" Hello", 2, "stop", 274)),
        ({"stop": " wor", "ignore_eos": True}, (" Hello the", 5, "stop", " wor")),
    ],
)
def test_a_stop_string_that_is_a_special_token_stops_there(
    llm: LLM, params: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert llm.tokenizer.special_tokens["<special>"] == 274
    assert ended(answer(llm, **params)) == expected
    [*_, last] = llm.stream([5], SamplingParams(max_tokens=50, **params))
    assert ended(last.outputs[0]) == expected


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"stop": " wor", "ignore_eos": True}, " Hello the wor"),
        ({"stop": "<special>"}, " Hello<special>"),
        ({"stop": " <special>\n"}, " Hello<special>"),
        ({"stop_token_ids": [274]}, " Hello"),
        ({"stop_token_ids": [274], "skip_special_tokens": False}, " Hello<special>"),
        ({"stop": "<special>", "skip_special_tokens": False}, " Hello<special>"),
        ({}, " Hello the"),
        ({"skip_special_tokens": False}, " Hello<special> the</s>"),
        ({"stop_token_ids": [259]}, " Hello the"),
    ],
)
def test_what_ended_an_answer_may_be_in_its_text(llm: LLM, params: dict[str, Any], text: str) -> None:
    assert llm.tokenizer._tokenizer.convert_tokens_to_ids("▁the") == 259
    found = answer(llm, include_stop_str_in_output=True, **params)
    assert (found.text, found.finish_reason) == (text, "stop")
    deltas = list(llm.stream([5], SamplingParams(max_tokens=50, include_stop_str_in_output=True,
                                                 output_kind=RequestOutputKind.DELTA, **params)))  # fmt: skip
    assert "".join(delta.outputs[0].text for delta in deltas) == text


def test_special_tokens_may_be_in_the_text(llm: LLM) -> None:
    shown = {"skip_special_tokens": False}
    assert answer(llm, ignore_eos=True, **shown).text == " Hello<special> the</s> world<s>."
    assert ended(answer(llm, **shown)) == (" Hello<special> the", 4, "stop", None)
    assert ended(answer(llm, stop="ial> t", **shown)) == (" Hello<spec", 3, "stop", "ial> t")
    assert ended(answer(llm, stop="<special>", **shown)) == (" Hello", 2, "stop", "<special>")
    assert ended(answer(llm, stop="Hello<special>", **shown)) == (" ", 2, "stop", "Hello<special>")


@pytest.mark.parametrize(("min_tokens", "text", "count"), [(0, " ", 1), (1, " Hello t", 3), (3, " Hello the world", 6)])
def test_stop_strings_that_come_too_early_are_passed_over(llm: LLM, min_tokens: int, text: str, count: int) -> None:
    params = {"ignore_eos": True, "min_tokens": min_tokens, "stop": ["Hello", "he", "<s>"]}
    found = answer(llm, **params)
    assert (found.text, len(found.token_ids)) == (text, count)


def test_stops_that_can_never_come_are_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="stop_token_ids has 300; ids are integers below 300"):
        answer(llm, stop_token_ids=[5, 300])
    words = Tokenizer(save_tokenizer(tmp_path, "metaspace"))  # which spell no "<"
    words.special_tokens[""] = 7
    with pytest.raises(RequestError, match=r"'<s>' in it .*; use '<s>' alone, or stop_token_ids=\[16\]"):
        stop_reasons(SamplingParams(stop="the<s>"), llm.info, words)
    words.special_tokens["world"] = 8
    ends = dict.fromkeys(llm.info.eos_token_ids)
    for stop, more in (("the world", {}), ("the", {}), ("world\n", {8: "world\n"}), (" <s>", {16: " <s>"})):
        assert stop_reasons(SamplingParams(stop=stop), llm.info, words) == ends | more
    assert answer(llm, stop="the<s>", ignore_eos=True).finish_reason == "length", "bytes may spell it"


def test_more_answers_than_can_run_are_refused_before_they_are_made(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkv.frontend.request_state.Answer", None)
    with pytest.raises(CapacityError, match="n is 1000000000 and max_num_seqs 64; lower n or raise max_num_seqs"):
        answer(llm, n=10**9)
    with pytest.raises(RequestError, match="2000000 tokens and max_model_len is 1048576"):
        llm.generate([[None] * 2_000_000], use_tqdm=False)


def test_a_prompt_of_more_tokens_than_may_be_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distkv.frontend.front_end, "launch", lambda *_: ScriptedEngine([40, 41, 42], (2, 3), 400))
    with LLM(folder, max_prompt_tokens=4) as llm:
        most = llm.generate([[5] * 4], use_tqdm=False)
        assert most[0].finished
        with pytest.raises(RequestError, match="has 5 tokens and max_prompt_tokens is 4; shorten the prompt or raise"):
            llm.generate([[5] * 4, [5] * 5], use_tqdm=False)
        with pytest.raises(RequestError, match=r"the prompt has \d+ tokens and max_prompt_tokens is 4"):
            llm.generate(["a b c d e f"], use_tqdm=False)
        monkeypatch.setattr(llm.tokenizer._tokenizer, "encode", None)
        with pytest.raises(RequestError, match="100000000 characters, and max_prompt_tokens is 4 tokens of at most"):
            llm.generate(["a" * 10**8], use_tqdm=False)


IDS, TEXT = [5, 6], "Hello the"


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        (IDS, 1),
        (tuple(IDS), 1),
        (range(5, 7), 1),
        (np.array(IDS), 1),
        (torch.tensor(IDS), 1),
        ([np.int64(5), np.int32(6)], 1),
        (list(torch.tensor(IDS)), 1),
        (np.array([IDS, IDS]), 2),
        ([tuple(IDS), np.array(IDS), torch.tensor(IDS)], 3),
        ((IDS, IDS), 2),
        ({"prompt_token_ids": IDS}, 1),
        ([{"prompt_token_ids": np.array(IDS)}, {"prompt_token_ids": tuple(IDS), "prompt": "Hello"}], 2),
        (TEXT, 1),
        (np.str_(TEXT), 1),
        ({"prompt": TEXT}, 1),
        ([TEXT, {"prompt": TEXT}, (TEXT)], 3),
    ],
)
def test_prompts_in_every_form_of_the_field_are_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prompts: Any, count: int
) -> None:
    llm, engine = scripted(folder, ["a"], [], monkeypatch)
    with llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        text_ids = llm.tokenizer.encode(TEXT)
        is_text = [text_ids == prompt for prompt in engine.prompts]
        assert len(engine.prompts) == count
        assert all(prompt in (IDS, text_ids) for prompt in engine.prompts)
        assert {type(token) for prompt in engine.prompts for token in prompt} == {int}
        assert all(output.prompt == TEXT for output, text in zip(outputs, is_text, strict=True) if text)


@pytest.mark.parametrize(
    "prompts",
    [None, 5, [None], [IDS, 6], {IDS[0]}, {"prompt": 5}, {}, {"prompt": "x", "images": []}, [{"prompt_token_ids": "x"}],
     [b"x"], np.array(5), object, [Unprintable()], [[1.5]], [[True]], [["x"]], np.array([[1.5]]), [[10**5000]],
     np.zeros((1, 2, 2), dtype=int)],
)  # fmt: skip
def test_prompts_of_no_known_form_are_refused(llm: LLM, prompts: object) -> None:
    with pytest.raises(RequestError, match=r"list|ids are integers") as error:
        llm.generate(prompts, use_tqdm=False)  # type: ignore[arg-type]
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("prompts", [["One"], [[5, 6]], [{"prompt": "One"}]])
def test_several_prompts_where_one_is_taken_are_told_from_bad_tokens(folder: Path, llm: LLM, prompts: Any) -> None:
    async def ask() -> None:
        async with await AsyncLLM.create(folder) as one:
            await anext(one.generate(prompts))

    calls = (lambda: llm.stream(prompts), lambda: llm.generate([prompts]), lambda: asyncio.run(ask()))
    for call in calls:
        with pytest.raises(RequestError, match=r"takes one prompt and got a list of them, .*to LLM\.generate as one"):
            call()


def test_arguments_of_a_call_may_be_numpys(llm: LLM) -> None:
    one = SamplingParams(max_tokens=1)
    outputs = llm.generate(
        [IDS, IDS], (one, one), priority=np.array([1, 2]), cache_salt=np.array(["a", "b"]), use_tqdm=False
    )
    assert len(outputs) == 2
    assert llm.generate([IDS], one, priority=np.int8(3), cache_salt=np.str_("a"), use_tqdm=False)
    for wrong in (0, "", {}):
        with pytest.raises(RequestError, match="sampling_params is"):
            llm.generate([IDS], wrong, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="priority is an unprintable int"):
        llm.generate([IDS], one, priority=10**5000, use_tqdm=False)
