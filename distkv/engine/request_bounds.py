"""What a request may hold so that no rank reads beyond a tensor: token ids of the model, and no more tokens than it has
positions. A front end checks it, and so does a leader, of whoever sends it requests."""

from collections.abc import Collection
from typing import Any

from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.errors import RequestError
from distkv.sampling_params import SamplingParams
from distkv.values import shown


def check_tokens(token_ids: list[Any], info: EngineInfo) -> None:
    """Raises RequestError for a prompt that is empty or too long, or has a token that the model does not know."""
    _check_length(token_ids, info)
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < info.vocab_size:
            raise RequestError(f"the prompt has token id {shown(token)}; ids are integers below {info.vocab_size}")


def check_params_of(params: SamplingParams, info: EngineInfo) -> None:
    """Raises RequestError for parameters with a token that the model does not know, and for drafts where there are
    none."""
    if params.num_speculative_tokens and info.speculation is None:
        raise RequestError(
            f"num_speculative_tokens is {params.num_speculative_tokens}, and the engine has no speculative_config; "
            "start it with one, or leave it out"
        )
    for name in ("allowed_token_ids", "logit_bias"):
        _check_ids(name, getattr(params, name) or (), info)


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raises RequestError for a request that no front end would send. Stop tokens may be any: others never come."""
    _check_length(request.prompt_token_ids, info)
    _check_ids("the prompt", request.prompt_token_ids, info)
    check_params_of(request.params, info)
    for word in request.bad_words_token_ids:
        _check_ids("bad_words", word, info)
        if not word:
            raise RequestError("bad_words has a word of no token; leave it out")
    room = info.max_model_len - len(request.prompt_token_ids)
    if not 1 <= request.max_tokens <= room:
        raise RequestError(f"max_tokens is {request.max_tokens}; the prompt leaves room for 1 to {room}")
    n = request.params.n
    if not all(0 <= index < n for index in request.begun):
        raise RequestError(f"answers {sorted(request.begun)} were begun, and n is {n}; they are counted from 0")
    for answer in request.begun.values():
        _check_ids("an answer that was begun", answer, info)
        if len(answer) >= request.max_tokens:
            raise RequestError(
                f"an answer that was begun has {len(answer)} tokens and max_tokens is {request.max_tokens}: it has "
                "ended; ask for the others alone"
            )
    if request.begun_logprobs is not None:
        _check_scored(request, request.begun_logprobs, info)


def _check_scored(request: EngineRequest, num_top: int, info: EngineInfo) -> None:
    begun = request.begun.get(0, [])
    if not 0 <= num_top <= info.vocab_size:
        raise RequestError(f"begun_logprobs is {num_top}; it must be from 0 to the model's {info.vocab_size} tokens")
    if request.params.n != 1 or not begun or request.max_tokens != len(begun) + 1:
        raise RequestError(
            f"begun_logprobs goes with one answer that was begun and ends with the next token; n is "
            f"{request.params.n}, {len(begun)} tokens were begun, and max_tokens is {request.max_tokens}"
        )


def _check_length(token_ids: list[Any], info: EngineInfo) -> None:
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if len(token_ids) >= info.max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and max_model_len is {info.max_model_len}, with one for "
            "the answer; shorten the prompt or raise max_model_len"
        )


def _check_ids(name: str, token_ids: Collection[int], info: EngineInfo) -> None:
    """By the extremes alone, since a leader that checks a million tokens does nothing else meanwhile."""
    for extreme in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= extreme < info.vocab_size:
            raise RequestError(f"{name} has {extreme}; ids are integers below {info.vocab_size}")
