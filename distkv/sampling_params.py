"""How a request's tokens are sampled and when it ends. Names and defaults are vLLM's."""

import math
from enum import Enum
from typing import Any

import msgspec

from distkv.errors import RequestError
from distkv.option_help import explained

MAX_LOGPROBS = 100


class RequestOutputKind(Enum):
    """What the outputs of a request hold while it runs."""

    CUMULATIVE = 0
    """All of the answers so far."""
    DELTA = 1
    """What is new since the output before, and of `n` answers only those that have grown; see `join_deltas`."""
    FINAL_ONLY = 2
    """There is no output but the finished one."""


@explained
class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """Sampling parameters of one request. Raises RequestError when a value is out of range."""

    n: int = 1
    """Answers to sample; they share the prompt's pages."""
    temperature: float = 1.0
    """Divisor of the logits; 0 is greedy decoding."""
    top_p: float = 1.0
    """Keep the likeliest tokens of this mass; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all.

    So does -1.
    """
    min_p: float = 0.0
    """Keep tokens of at least this share of the likeliest one's probability; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens of the prompt and the answer."""
    presence_penalty: float = 0.0
    """Above 0 discourages tokens of the answer, however often they occur."""
    frequency_penalty: float = 0.0
    """Above 0 discourages tokens of the answer, once per occurrence."""
    max_tokens: int | None = 16
    """Most tokens of an answer.

    None means up to the model's limit.
    """
    stop: str | list[str] | None = None
    """Text that ends the answer; there may be several.

    It is not part of the answer, and is found wherever the token borders lie.
    """
    stop_token_ids: list[int] | None = None
    """Tokens that end the answer, beside the model's own unless ignore_eos.

    They are not part of the text.
    """
    ignore_eos: bool = False
    """Go on past the model's own end token."""
    seed: int | None = None
    """Makes the answer reproducible.

    It repeats whatever else runs, as far as rounding in the logits lets it. None takes a seed from the engine's and the
    order of requests.
    """
    logprobs: int | None = None
    """How many of the likeliest tokens to return at each place.

    They come beside the sampled one; None returns none.
    """
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """Whether outputs are cumulative, deltas, or come at the end alone."""

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1)
        _check_number("temperature", self.temperature, 0, math.inf)
        _check_number("top_p", self.top_p, 0, 1, low_open=True)
        _check_int("top_k", self.top_k, -1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, low_open=True)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63))
        if not isinstance(self.stop, str | list | None) or not all(
            isinstance(text, str) and text for text in self.stop_strings
        ):
            raise RequestError(f"stop is {self.stop!r}; it must be a string or a list of strings, none of them empty")
        if not isinstance(self.stop_token_ids, list | None):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}; it must be a list of token ids")
        for token in self.stop_token_ids or []:
            _check_int("stop_token_ids", token, 0)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(f"output_kind is {self.output_kind!r}; it must be a RequestOutputKind")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def _check_int(name: str, value: Any, low: int, high: int = 2**63 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be an integer from {low} to {high}")


def _check_number(name: str, value: Any, low: float, high: float, low_open: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (low_open and value == low):
        above = f"above {low}" if low_open else f"of at least {low}"
        limits = above if high == math.inf else f"{above} and at most {high}"
        raise RequestError(f"{name} is {value!r}; it must be a number {limits}")
