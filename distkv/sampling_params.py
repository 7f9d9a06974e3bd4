"""How a request's tokens are sampled and when it ends. Names and defaults are vLLM's."""

from enum import Enum
from typing import Any

import msgspec

from distkv.errors import RequestError
from distkv.option_help import explained
from distkv.values import integer, listed, number, plain, shown, text

MAX_LOGPROBS = 100
MAX_STOPS = 256  # each is looked for with every token
MAX_INT = 2**63 - 1


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
    """Sampling parameters of one request; numbers and lists may be numpy's, and become Python's. Raises RequestError
    when a value is out of range."""

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

    It is not part of the answer, and is found wherever the token borders lie. The text of a special token, with
    or without blanks around it, stands for that token, too.
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
        self._set("n", integer("n", self.n, 1))
        self._set("temperature", number("temperature", self.temperature, 0))
        self._set("top_p", number("top_p", self.top_p, 0, 1, low_open=True))
        self._set("top_k", integer("top_k", self.top_k, -1))
        self._set("min_p", number("min_p", self.min_p, 0, 1))
        self._set("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0, low_open=True))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, number(name, getattr(self, name), -2, 2))
        for name, low, high in (("max_tokens", 1, MAX_INT), ("logprobs", 0, MAX_LOGPROBS), ("seed", -(2**63), MAX_INT)):
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), low, high))
        if self.stop is not None:
            self._set("stop", _stop(self.stop))
        if self.stop_token_ids is not None:
            self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        self._set("ignore_eos", plain(self.ignore_eos))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {shown(self.ignore_eos)}; it must be True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(f"output_kind is {shown(self.output_kind)}; it must be a RequestOutputKind")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def _set(self, name: str, value: Any) -> None:
        """Has a field hold what was made of its value."""
        msgspec.structs.force_setattr(self, name, value)


def _stop(value: Any) -> str | list[str]:
    found = [value] if isinstance(plain(value), str) else listed(value)
    texts = None if found is None else [text(one) for one in found]
    if texts is None or not all(texts):
        raise RequestError(f"stop is {shown(value)}; it must be a string or a list of strings, none of them empty")
    if len(texts) > MAX_STOPS:
        raise RequestError(f"stop has {len(texts)} strings; it must be {MAX_STOPS} at most")
    return texts[0] if isinstance(plain(value), str) else texts  # type: ignore[return-value]


def _stop_token_ids(value: Any) -> list[int]:
    found = listed(value)
    if found is None:
        raise RequestError(f"stop_token_ids is {shown(value)}; it must be a list of token ids")
    return [integer("stop_token_ids", token, 0) for token in found]
