"""What a request must be like before it is sent to the engine. Every refusal is a RequestError that names the cure, and
what may be had in several forms is brought into one."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from distkv.engine.protocol import EngineInfo
from distkv.engine.request_bounds import check_params_of
from distkv.errors import CapacityError, RequestError
from distkv.sampling_params import SamplingParams
from distkv.values import integer, listed, plain, shown, text

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class PromptDict(TypedDict, total=False):
    """A prompt as a dict, of a text or of token ids; with both, the token ids count. It may bring its salt."""

    prompt: str
    prompt_token_ids: Sequence[int]
    cache_salt: str | None


Prompt = str | Sequence[int] | PromptDict
"""A prompt as text, as token ids in a list, tuple or array, or as a dict of either."""


class PlainPrompt(NamedTuple):
    """A prompt in one form."""

    text: str | None
    token_ids: list[int] | None  # where they were given
    cache_salt: Any = None  # that it brought with it, as it was given


def plain_prompt(prompt: Any) -> PlainPrompt:
    """Raises RequestError for what is no prompt."""
    if isinstance(prompt, dict):
        unknown = [key for key, value in prompt.items() if key not in PROMPT_KEYS and value is not None]
        if unknown or not prompt:
            key = shown(unknown[0]) if unknown else "nothing in it"
            raise RequestError(f"a prompt is a dict with {key}; give 'prompt', a text, or 'prompt_token_ids', a list")
        words, token_ids, salt = (prompt.get(key) for key in PROMPT_KEYS)
    else:
        words, token_ids, salt = (prompt, None, None) if isinstance(plain(prompt), str) else (None, prompt, None)
    words, found = plain(words), listed(token_ids)
    if not isinstance(words, str | None) or (found is None and (token_ids is not None or words is None)):
        raise RequestError(f"a prompt is {shown(prompt)}; it must be a text or a list of token ids")
    if found and isinstance(found[0], str | dict | list | tuple | range):
        raise RequestError(
            f"this takes one prompt and got a list of them, {shown(prompt)}; give a text or a list of token ids, and "
            "several prompts to LLM.generate as one list"
        )
    return PlainPrompt(None if words is None else str(words), found, salt)


def plain_prompts(prompts: Any) -> list[Any]:
    """One prompt or several as a list of prompts; raises RequestError for neither."""
    if isinstance(prompts, str | dict):
        return [prompts]
    found = listed(prompts)
    if found is None:
        raise RequestError(f"prompts is {shown(prompts)}; give a text, a list of token ids, or a list of these")
    return [found] if found and all(isinstance(token, int) for token in found) else found


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """A value for each of `count` prompts, which all may share one; raises RequestError for any other number."""
    values = listed(value)
    if values is None:
        return [value] * count
    if len(values) != count:
        raise RequestError(f"{count} prompts came with {len(values)} {name}; give one each, or one for all")
    return values


def check_params(params: Any, info: EngineInfo) -> None:
    """Raises RequestError for other than a SamplingParams and for tokens that the model does not know, CapacityError
    for more answers than can ever run."""
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params is {shown(params)}; it must be a SamplingParams")
    check_params_of(params, info)
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


def plain_salt(cache_salt: Any, own: Any = None) -> str | None:
    """The salt of a prompt that was given beside it, or that it brought as its own. Raises RequestError for other than
    a text or None, and for two that differ."""
    given = [one for one in (cache_salt, own) if one is not None]
    salts = [text(one) for one in given]
    for one, salt in zip(given, salts, strict=True):
        if salt is None:
            raise RequestError(f"cache_salt is {shown(one)}; it must be a text, or None to share with all others")
    if len(set(salts)) > 1:
        raise RequestError(f"cache_salt is {shown(salts[0])}, and {shown(salts[1])} in the prompt; give one of them")
    return salts[0] if salts else None


def check_prompt_length(token_ids: list[Any], max_prompt_tokens: int | None) -> None:
    """Raises RequestError for a prompt of more tokens than are allowed, if that is bounded."""
    if max_prompt_tokens is not None and len(token_ids) > max_prompt_tokens:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and max_prompt_tokens is {max_prompt_tokens}; shorten the prompt "
            "or raise max_prompt_tokens"
        )
