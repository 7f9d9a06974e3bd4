"""Requests that no front end would send: none of them reaches a rank."""

from typing import Any

import msgspec
import pytest

from distkv.engine.protocol import Add, EngineInfo, EngineRequest, decode_command, encode
from distkv.engine.request_bounds import check_request
from distkv.errors import RequestError
from distkv.sampling_params import SamplingParams

VOCAB, POSITIONS = 300, 64
INFO = EngineInfo(POSITIONS, 64, 2048, 16, 1, 0, 0, 1, 1, 1, VOCAB, (2,), 0, None)
GOOD: dict[str, Any] = {
    "prompt_token_ids": [0, VOCAB - 1] * 8,
    "params": SamplingParams(n=2, logit_bias={0: 1.0, VOCAB - 1: 1.0}, allowed_token_ids=[0, VOCAB - 1]),
    "max_tokens": POSITIONS - 16,
    "stop_token_ids": frozenset({2, 10**6, -1}),
    "bad_words_token_ids": [[0], [VOCAB - 1, 5]],
    "begun": {0: [0] * (POSITIONS - 17), 1: [VOCAB - 1]},
}


def request(**changed: Any) -> EngineRequest:
    return EngineRequest("1", seed=0, **GOOD | changed)


def test_what_is_within_bounds_passes() -> None:
    check_request(request(), INFO)


@pytest.mark.parametrize("token", [VOCAB, 10**6, -1, -(10**6), 2**63 - 1])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: {"prompt_token_ids": [5, token, 6]},
        lambda token: {"bad_words_token_ids": [[5], [6, token]]},
        lambda token: {"begun": {1: [5, token]}},
    ],
)
def test_tokens_that_the_model_does_not_know_are_refused(spoil: Any, token: int) -> None:
    with pytest.raises(RequestError, match=rf"has {token}; ids are integers below 300"):
        check_request(request(**spoil(token)), INFO)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [1] * POSITIONS}, "the prompt has 64 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0; the prompt leaves room for 1 to 48"),
        ({"max_tokens": POSITIONS}, "max_tokens is 64"),
        ({"begun": {2: [5]}}, "were begun, and n is 2"),
        ({"begun": {-1: [5]}}, "were begun, and n is 2"),
        ({"begun": {0: [5] * 48}}, "has 48 tokens and max_tokens is 48"),
        ({"bad_words_token_ids": [[]]}, "a word of no token"),
        ({"params": SamplingParams(logit_bias={VOCAB: 1.0})}, "logit_bias has 300"),
        ({"params": SamplingParams(allowed_token_ids=[VOCAB])}, "allowed_token_ids has 300"),
    ],
)
def test_other_bounds(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_request(request(**{"begun": {}} | changed), INFO)


@pytest.mark.parametrize(
    "name, value",
    [("n", 0), ("n", 2**63), ("top_k", -2), ("temperature", -1.0), ("logprobs", 10**6), ("logit_bias", {-5: 1.0})],
)
def test_parameters_are_checked_wherever_they_are_decoded(name: str, value: Any) -> None:
    """Those that `SamplingParams` refuses cannot be made, so they are put into the message."""
    message = msgspec.msgpack.decode(encode(Add([request()])))
    message["requests"][0]["params"][name] = value
    with pytest.raises(msgspec.MsgspecError):
        decode_command(msgspec.msgpack.encode(message))
