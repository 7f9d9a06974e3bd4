"""What a request must be like before it is sent to the engine. Every refusal is a RequestError that names the cure, and
what may be had in several forms is brought into one."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from distkv.engine.protocol import EngineInfo
from distkv.errors import CapacityError, RequestError
from distkv.sampling_params import SamplingParams
from distkv.values import integer, listed, plain, shown, text

PROMPT_KEYS = ("prompt", "prompt_token_ids")


class PromptDict(TypedDict, total=False):
    """A prompt as a dict, of a text or of token ids; with both, the token ids count."""

    prompt: str
    prompt_token_ids: Sequence[int]


Prompt = str | Sequence[int] | PromptDict
"""A prompt as text, as token ids in a list, tuple or array, or as a dict of either."""


class PlainPrompt(NamedTuple):
    """A prompt in one form."""

    text: str | None
    token_ids: list[int] | None  # where they were given


def plain_prompt(prompt: Any) -> PlainPrompt:
    """Raises RequestError for what is no prompt."""
    if isinstance(prompt, dict):
        unknown = [key for key in prompt if key not in PROMPT_KEYS]
        if unknown or not prompt:
            key = shown(unknown[0]) if unknown else "nothing in it"
            raise RequestError(f"a prompt is a dict with {key}; give 'prompt', a text, or 'prompt_token_ids', a list")
        words, token_ids = (prompt.get(key) for key in PROMPT_KEYS)
    else:
        words, token_ids = (prompt, None) if isinstance(plain(prompt), str) else (None, prompt)
    words, found = plain(words), listed(token_ids)
    if not isinstance(words, str | None) or (found is None and (token_ids is not None or words is None)):
        raise RequestError(f"a prompt is {shown(prompt)}; it must be a text or a list of token ids")
    return PlainPrompt(None if words is None else str(words), found)


def plain_prompts(prompts: Any) -> list[Any]:
    """One prompt or several as a list of prompts; raises RequestError for neither."""
    if isinstance(prompts, str | dict):
        return [prompts]
    found = listed(prompts)
    if found is None:
        raise RequestError(f"prompts is {shown(prompts)}; give a text, a list of token ids, or a list of these")
    return [found] if found and all(isinstance(token, int) for token in found) else found


def check_params(params: Any, info: EngineInfo) -> None:
    """Raises RequestError for other than a SamplingParams, CapacityError for more answers than can ever run."""
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params is {shown(params)}; it must be a SamplingParams")
    if params.n > info.max_num_seqs:
        raise CapacityError(f"n is {params.n} and max_num_seqs {info.max_num_seqs}; lower n or raise max_num_seqs")


def plain_priority(priority: Any) -> int:
    """Raises RequestError for other than an integer of 64 bits."""
    try:
        return integer("priority", priority, -(2**63))
    except RequestError as error:
        raise RequestError(
            f"priority is {shown(priority)}; it must be an integer of 64 bits, and lower goes first"
        ) from error


def plain_salt(cache_salt: Any) -> str | None:
    """Raises RequestError for other than a text or None."""
    salt = text(cache_salt)
    if salt is None and cache_salt is not None:
        raise RequestError(f"cache_salt is {shown(cache_salt)}; it must be a text, or None to share with all others")
    return salt


def check_tokens(token_ids: list[Any], info: EngineInfo) -> None:
    """Raises RequestError for a prompt that is empty or too long, or has a token that the model does not know."""
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if len(token_ids) >= info.max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and max_model_len is {info.max_model_len}, with one for "
            "the answer; shorten the prompt or raise max_model_len"
        )
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < info.vocab_size:
            raise RequestError(f"the prompt has token id {shown(token)}; ids are integers below {info.vocab_size}")
