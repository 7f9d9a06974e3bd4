"""Outputs of each kind that are made of the same tokens: deltas join to the cumulative output, and cost what is new."""

import pickle
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkv import RequestError, RequestOutput, RequestOutputKind, SamplingParams, StoreError
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.frontend.request_state import RequestState
from distkv.frontend.stop_strings import StopStrings
from distkv.outputs import join_deltas
from distkv.workers.sampling.sampled_token import TokenLogprobs

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
TEXTS = st.text("aab é漢🙂", min_size=1, max_size=12)


class ByteTokenizer:
    """A token is a byte, so that all else than ASCII comes in parts."""

    num_decoded = 0

    def decode(self, token_ids: list[int]) -> str:
        self.num_decoded += len(token_ids)
        return bytes(token_ids).decode("utf-8", "replace")

    def has_text(self, token_id: int) -> bool:
        return True

    def is_byte(self, token_id: int) -> bool:
        return False

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])


def state_of(kind: RequestOutputKind, params: SamplingParams, tokenizer: Any = None) -> RequestState:
    params = msgspec.structs.replace(params, output_kind=kind)
    return RequestState(EngineRequest("0", list(b"prompt"), params, 100, 0), None, tokenizer or ByteTokenizer(), {})


def token_output(index: int, token_id: int, finish_reason: str | None = None) -> TokenOutput:
    logprobs = TokenLogprobs(-0.5, 1, [(token_id, -0.5), (97, -1.0)])
    return TokenOutput("0", index, token_id, logprobs, finish_reason, None, (1, 0, 2))


def grown(output: RequestOutput) -> RequestOutput:
    """A cumulative output without the answers that have not begun."""
    return replace(output, outputs=[one for one in output.outputs if one.token_ids or one.finish_reason])


@given(st.data())
def test_deltas_join_to_the_cumulative_output_at_any_time(data: st.DataObject) -> None:
    """Whatever the text, the stop strings, the order of the answers, the tokens between two outputs, and the end."""
    n = data.draw(st.integers(1, 3), "n")
    stop = data.draw(st.lists(st.text("ab é漢", min_size=1, max_size=4), max_size=3), "stop")
    params = SamplingParams(n=n, stop=stop, logprobs=data.draw(st.sampled_from([None, 1]), "logprobs"))
    tokens = [list(data.draw(TEXTS, f"text {index}").encode()) for index in range(n)]
    order = data.draw(st.permutations([index for index in range(n) for _ in tokens[index]]), "order")
    failing = data.draw(st.none() | st.integers(0, len(order)), "failing")
    states = {kind: state_of(kind, params) for kind in RequestOutputKind}

    deltas: list[RequestOutput] = []
    for step, index in enumerate(order):
        if step == failing:
            break
        token = tokens[index].pop(0)
        if not states[DELTA].is_finished(index):
            for state in states.values():
                state.add(token_output(index, token, None if tokens[index] else "length"))
            if data.draw(st.booleans(), "an output now"):
                deltas.append(states[DELTA].emit())
                assert grown(states[CUMULATIVE].emit()) == join_deltas(deltas)
        assert states[FINAL_ONLY].is_due == states[FINAL_ONLY].finished
    error = StoreError("on fire")
    for state in states.values():
        if not state.finished:
            state.fail(error)
    deltas.append(states[DELTA].emit())
    whole = states[CUMULATIVE].emit()
    assert join_deltas(deltas) == whole == states[FINAL_ONLY].emit()
    assert whole.finished and (whole.error is None) == all(one.finish_reason != "error" for one in whole.outputs)


def test_a_delta_holds_the_answers_that_have_grown_and_only_the_last_one_says_why_it_ended() -> None:
    state = state_of(DELTA, SamplingParams(n=3, stop="end", logprobs=1))
    for index in (2, 0):
        state.add(token_output(index, 65))
    first = state.emit()
    assert [(one.index, one.text, one.token_ids) for one in first.outputs] == [(0, "", [65]), (2, "", [65])]
    for letter in b"xyzend":
        state.add(token_output(2, letter))
    [second] = state.emit().outputs
    assert (second.index, second.text, second.token_ids) == (2, "Axyz", list(b"xyzend"))
    assert (second.finish_reason, second.stop_reason, second.cumulative_logprob) == ("stop", "end", -3.5)
    assert second.logprobs is not None and [len(table) for table in second.logprobs] == [2] * 6
    state.fail(StoreError("on fire"))
    last = state.emit()
    assert [(one.index, one.text, one.finish_reason) for one in last.outputs] == [(0, "A", "error"), (1, "", "error")]
    assert last.finished and str(last.error) == "on fire"
    assert {one.finish_reason for one in first.outputs} == {None} and not first.finished


@pytest.mark.parametrize(
    "stops, pieces, free, found",
    [
        ([], ["a", "bc"], ["a", "bc"], None),
        (["end"], ["the e", "n", "emy"], ["the", " ", "ene"], None),
        (["end"], ["the ", "e", "nd", "ing"], ["th", "e", " "], "end"),
        (["end"], ["the ending"], ["the "], "end"),
        (["ended"], ["en", "ded"], ["", ""], "ended"),
        (["b", "abc"], ["xa", "bc"], ["", "x"], "abc"),
        (["abc", "ab"], ["xa", "bc"], ["", "x"], "ab"),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (["é漢"], ["é", "é", "漢"], ["", "é", ""], "é漢"),
    ],
)
def test_stop_strings_hold_back_what_may_become_one(
    stops: list[str], pieces: list[str], free: list[str], found: str | None
) -> None:
    stop_strings, given_out = StopStrings(stops), []
    for piece in pieces:
        if stop_strings.found is None:
            given_out.append(stop_strings.add(piece))
    assert (given_out, stop_strings.found) == (free, found)
    rest = stop_strings.release()
    assert rest == "" if found else "".join([*given_out, rest]) == "".join(pieces)
    assert stop_strings.release() == ""


def test_the_work_of_a_delta_does_not_grow_with_the_answer() -> None:
    """What a request holds after an output is all that the next one could copy or look through."""
    tokenizer = ByteTokenizer()
    state = state_of(DELTA, SamplingParams(n=2, stop=["not in there", "nor this"], logprobs=1), tokenizer)
    held, decoded, emitted = set(), set(), set()
    for step in range(2000):
        tokenizer.num_decoded = 0
        for index in range(2):
            state.add(token_output(index, 97 + step % 2))
        delta = state.emit()
        if step >= 100:  # the sum of the log-probabilities takes the same bytes at any length
            held.add(len(pickle.dumps((state._answers, state._grown, state._unfinished))))
            decoded.add(tokenizer.num_decoded)
            emitted.add(tuple((len(one.text), len(one.token_ids), len(one.logprobs or [])) for one in delta.outputs))
    assert emitted == {((1, 1, 1), (1, 1, 1))}
    assert max(held) - min(held) < 10 and max(decoded) < 20
    cumulative = state_of(CUMULATIVE, SamplingParams())
    sizes = []
    for _ in range(200):
        cumulative.add(token_output(0, 97))
        cumulative.emit()
        sizes.append(len(pickle.dumps(cumulative._answers)))
    assert sizes[-1] > sizes[0] + 300, "the measure sees what is kept"


@pytest.mark.parametrize("kind", [1, "DELTA", None])
def test_another_kind_of_output_is_refused(kind: Any) -> None:
    with pytest.raises(RequestError, match=r"output_kind is .*; it must be a RequestOutputKind"):
        SamplingParams(output_kind=kind)


def test_the_kind_goes_through_the_socket_and_defaults_are_not_shown() -> None:
    params = SamplingParams(output_kind=DELTA)
    assert repr(SamplingParams(n=2)) == "SamplingParams(n=2)"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
