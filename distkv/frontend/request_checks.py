"""What a request must be like before it is sent to the engine. Every refusal is a RequestError that names the cure."""

from distkv.engine.protocol import EngineInfo
from distkv.errors import RequestError
from distkv.sampling_params import SamplingParams

Prompt = str | list[int]
"""A prompt as text or as token ids."""


def check_arguments(prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str | None) -> None:
    """Raises RequestError for an argument of another type, or a priority out of range."""
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params is {params!r}; it must be a SamplingParams")
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
        raise RequestError(f"priority is {priority!r}; it must be an integer of 64 bits, and lower goes first")
    if cache_salt is not None and not _is_text(cache_salt):
        raise RequestError(f"cache_salt is {cache_salt!r}; it must be a text, or None to share with all others")
    if not isinstance(prompt, str | list):
        raise RequestError(f"a prompt is {prompt!r}; it must be a text or a list of token ids")


def check_tokens(token_ids: list[int], info: EngineInfo) -> None:
    """Raises RequestError for a prompt that is empty or too long, or has a token that the model does not know."""
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < info.vocab_size:
            raise RequestError(f"the prompt has token id {token!r}; ids are integers below {info.vocab_size}")
    if len(token_ids) >= info.max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and max_model_len is {info.max_model_len}, with one for "
            "the answer; shorten the prompt or raise max_model_len"
        )


def _is_text(value: object) -> bool:
    """Whether it is a str of Unicode, without the lone surrogates that stand for bytes of other encodings."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False
