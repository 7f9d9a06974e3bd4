"""One answer, from the tokens that the engine samples to what a user reads."""

from typing import Any

import pytest

from distkv import CompletionOutput, SamplingParams
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.frontend.answer import Answer
from distkv.frontend.end_tokens import StopReasons
from distkv.outputs import Logprob
from distkv.workers.sampling.sampled_token import TokenLogprobs


class Letters:
    """A token is a byte."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def has_text(self, token_id: int) -> bool:
        return True

    def is_byte(self, token_id: int) -> bool:
        return False

    def token_text(self, token_id: int) -> str:
        return f"<{chr(token_id)}>"


LETTERS: Any = Letters()


def answer_of(tokenizer: Any = LETTERS, reasons: StopReasons | None = None, **params: Any) -> Answer:
    request = EngineRequest("0", list(b"prompt"), SamplingParams(**params), 100, 0)
    return Answer(request, 2, tokenizer, reasons or {})


def write(
    answer: Answer, text: bytes, finish_reason: str | None = None, stop_reason: int | None = None
) -> CompletionOutput:
    """The answer after these tokens, the last of which ends it where a reason is given."""
    for place, token in enumerate(text, 1):
        last = place == len(text)
        reasons = (finish_reason, stop_reason) if last else (None, None)
        answer.add(TokenOutput("0", 2, token, None, *reasons))
    return answer.output()


def test_text_and_tokens_grow_until_the_engine_says_why_they_end() -> None:
    answer = answer_of()
    assert write(answer, b"ab") == CompletionOutput(2, "ab", [97, 98], None, None, None, None)
    assert not answer.finished
    assert write(answer, b"c", "length") == CompletionOutput(2, "abc", [97, 98, 99], None, None, "length", None)
    assert answer.finished


@pytest.mark.parametrize("stop_reason", [None, 33, "!"])
def test_an_end_token_is_among_the_tokens_and_not_in_the_text(stop_reason: int | str | None) -> None:
    output = write(answer_of(reasons={33: stop_reason}), b"ab!", "stop", 33)
    assert output == CompletionOutput(2, "ab", [97, 98, 33], None, None, "stop", stop_reason)


def test_a_character_that_stays_incomplete_is_shown_at_the_end() -> None:
    answer = answer_of()
    assert write(answer, b"a\xc3").text == "a"
    assert write(answer, b"\xa9\xc3", "length").text == "a\u00e9\ufffd"
    answer = answer_of()
    write(answer, b"a\xc3")
    assert write(answer, b"!", "stop").text == "a\ufffd"


def test_what_is_held_back_for_a_stop_string_comes_with_the_end() -> None:
    answer = answer_of(stop="end")
    assert write(answer, b"the e").text == "the"
    assert write(answer, b"n", "length").text == "the en"
    answer = answer_of(stop="end")
    write(answer, b"the e")
    answer.fail()
    assert answer.finished and answer.output() == CompletionOutput(2, "the e", [*b"the e"], None, None, "error", None)


@pytest.mark.parametrize("reason", [None, "length"])
def test_a_stop_string_ends_the_answer_whatever_the_engine_says(reason: str | None) -> None:
    answer = answer_of(stop=["end", "never"])
    output = write(answer, b"the end", reason)
    assert output == CompletionOutput(2, "the ", [*b"the end"], None, None, "stop", "end")
    assert answer.finished


def test_a_table_holds_the_likeliest_by_rank_and_the_token_itself() -> None:
    answer = answer_of(logprobs=2)
    top = [(97, -0.5), (98, -1.0)]
    answer.add(TokenOutput("0", 2, 98, TokenLogprobs(-1.0, 2, top), None, None))
    answer.add(TokenOutput("0", 2, 99, TokenLogprobs(-2.5, 7, top), None, None))
    likeliest = {97: Logprob(-0.5, 1, "<a>"), 98: Logprob(-1.0, 2, "<b>")}
    output = answer.output()
    assert output.logprobs == [likeliest, likeliest | {99: Logprob(-2.5, 7, "<c>")}]
    assert output.cumulative_logprob == -3.5


def test_without_a_tokenizer_there_are_tokens_alone() -> None:
    answer = answer_of(None, logprobs=0)
    answer.add(TokenOutput("0", 2, 98, TokenLogprobs(-1.0, 2, []), None, None))
    assert answer.output() == CompletionOutput(2, "", [98], -1.0, [{98: Logprob(-1.0, 2, None)}], None, None)


def test_parts_hold_what_is_new() -> None:
    answer = answer_of(stop="end", logprobs=0)
    parts = []
    for token in b"been":
        answer.add(TokenOutput("0", 2, token, TokenLogprobs(-1.0, 1, []), None, None))
        parts.append(answer.take())
    assert [(one.text, one.token_ids, len(one.logprobs or [])) for one in parts] == [
        ("", [98], 1), ("", [101], 1), ("b", [101], 1), ("e", [110], 1)
    ]  # fmt: skip
    assert [one.cumulative_logprob for one in parts] == [-1, -2, -3, -4]
    answer.fail()
    assert (answer.take().text, answer.take().text) == ("en", "")
