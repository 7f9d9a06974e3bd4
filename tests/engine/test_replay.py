"""Requests that are run again: their callers miss no token and get none twice."""

import pytest

from distkv.engine.protocol import EngineRequest, PromptLogprobs, RequestFailed, TokenOutput
from distkv.engine.replay import Replay
from distkv.sampling_params import SamplingParams


def request(n: int = 1) -> EngineRequest:
    return EngineRequest("7", [1, 2, 3], SamplingParams(n=n), 10, 0)


def token(index: int, token_id: int, reason: str | None = None) -> TokenOutput:
    return TokenOutput("7", index, token_id, None, reason, None)


def scores(first: int, count: int) -> PromptLogprobs:
    return PromptLogprobs("7", first, [(at, 0.0, [], []) for at in range(first, first + count)])  # type: ignore[misc]


def test_a_second_run_goes_on_behind_what_was_given() -> None:
    replay = Replay(request())
    assert replay.run() == request()
    assert replay.run() == request()
    assert [replay.pass_on(token(0, one)) for one in (5, 6)] == [token(0, 5), token(0, 6)]
    again = replay.run()
    assert again == EngineRequest("7", [1, 2, 3], SamplingParams(), 10, 0, begun={0: [5, 6]})
    assert replay.pass_on(token(0, 7)) == token(0, 7)
    assert again.begun == {0: [5, 6]}
    assert replay.run().begun == {0: [5, 6, 7]}
    assert replay.pass_on(token(0, 8, "length")) == token(0, 8, "length")
    assert (replay.is_open, replay.num_runs) == (False, 4)


def test_only_open_answers_go_on() -> None:
    replay = Replay(request(n=4))
    replay.close(3)
    assert replay.run() == request(n=4) and replay.closed == [3]
    replay.pass_on(token(0, 5, "stop"))
    replay.pass_on(token(1, 5))
    assert replay.run().begun == {1: [5], 2: []}
    assert (replay.num_open, replay.closed) == (2, [0, 3])
    assert [replay.pass_on(token(index, 6)) for index in range(4)] == [None, token(1, 6), token(2, 6), None]
    replay.close(None)
    assert not replay.is_open and replay.pass_on(token(2, 6)) is None


def test_a_failure_is_passed_on_once() -> None:
    replay = Replay(request())
    replay.run()
    failed = RequestFailed("7", "DistKVError", "NaN")
    assert replay.pass_on(failed) == failed
    assert replay.pass_on(failed) is None and not replay.is_open


@pytest.mark.parametrize(
    "chunks", [[(1, 5)], [(1, 2), (3, 3)], [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)], [(1, 4), (5, 1)]]
)
def test_scores_of_a_prompt_come_once(chunks: list[tuple[int, int]]) -> None:
    """However the second run cuts the prompt."""
    replay = Replay(request())
    replay.run()
    given = [replay.pass_on(scores(1, 2)), replay.pass_on(scores(3, 1))]
    replay.run()
    given += [replay.pass_on(scores(*chunk)) for chunk in chunks]
    tables = [one for output in given if isinstance(output, PromptLogprobs) for one in output.tokens]
    assert tables == scores(1, 5).tokens
    assert all(output.first == output.tokens[0][0] for output in given if isinstance(output, PromptLogprobs))  # type: ignore[index]
