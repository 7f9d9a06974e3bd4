"""How a request's tokens are sampled and when it ends. Names and defaults are vLLM's."""

from enum import Enum
from typing import Any

import msgspec

from distkv.errors import RequestError
from distkv.option_help import explained
from distkv.structured_outputs.params import StructuredOutputsParams
from distkv.values import flag, integer, listed, number, plain, shown, text

MAX_LOGPROBS = 100
MAX_STOPS = 256  # each is looked for with every token
MAX_BAD_WORDS = 4096
MAX_BIAS = 100.0
MAX_INT = 2**63 - 1
OPTIONAL_INTEGERS = (
    ("max_tokens", 1, MAX_INT),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("seed", -(2**63), MAX_INT),
    ("num_speculative_tokens", 0, MAX_INT),
)
"""Fields that are None or within these limits."""
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens")


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
    min_tokens: int = 0
    """Tokens of an answer before an end token or a stop string may end it."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string, or with the text of the token, that ended it."""
    bad_words: list[str] | None = None
    """Words that an answer is kept from.

    Each as the tokens that it is encoded to, by itself and behind a blank; other tokens may still spell it.
    """
    allowed_token_ids: list[int] | None = None
    """Tokens of which an answer is made; None allows all.

    End tokens must be among them, or the answer ends with max_tokens.
    """
    logit_bias: dict[int, float] | None = None
    """What is added to the logits of tokens, by their ids, from -100 to 100.

    It is added before penalties and temperature, and is not in the log-probabilities that are returned.
    """
    structured_outputs: StructuredOutputsParams | None = None
    """A JSON schema, expression, choice or grammar that an answer keeps to."""
    seed: int | None = None
    """Makes the answer reproducible.

    It repeats whatever else runs, as far as rounding in the logits lets it. None takes a seed from the engine's and the
    order of requests.
    """
    logprobs: int | None = None
    """How many of the likeliest tokens to return at each place.

    They come beside the sampled one; None returns none.
    """
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to return at each place of the prompt.

    They come beside the prompt's own token; None returns none. The whole prompt is computed, whatever of it is cached.
    """
    num_speculative_tokens: int | None = None
    """Most tokens of a draft, with an engine that has speculative_config; 0 drafts none.

    It changes no answer. None is as many as the engine's.
    """
    skip_special_tokens: bool = True
    """Whether text leaves out special tokens."""
    spaces_between_special_tokens: bool = True
    """Must be True: blanks between tokens are a matter of the tokenizer's files.

    A fast tokenizer, which each model has here, has no such option.
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
        for name, low, high in OPTIONAL_INTEGERS:
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), low, high))
        if self.stop is not None:
            self._set("stop", _stop(self.stop))
        if self.stop_token_ids is not None:
            self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is []; it must be a list of one token id at least")
        if self.bad_words is not None:
            self._set("bad_words", _bad_words(self.bad_words))
        if self.logit_bias is not None:
            self._set("logit_bias", _logit_bias(self.logit_bias))
        for name in FLAGS:
            self._set(name, flag(name, getattr(self, name)))
        if not self.spaces_between_special_tokens:
            raise RequestError(
                "spaces_between_special_tokens is False; it must be left out: a fast tokenizer puts blanks between "
                "tokens as its own files say, and has no such option"
            )
        self._set("min_tokens", integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}; it must be max_tokens, {self.max_tokens}, at most")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                f"structured_outputs is {shown(self.structured_outputs)}; it must be a StructuredOutputsParams"
            )
        if self.structured_outputs is not None and self.ignore_eos:
            raise RequestError(
                "ignore_eos is True beside structured_outputs, whose answers end when they are complete; it must be "
                "left out"
            )
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


def _token_ids(name: str, value: Any) -> list[int]:
    found = listed(value)
    if found is None:
        raise RequestError(f"{name} is {shown(value)}; it must be a list of token ids")
    return [integer(name, token, 0) for token in found]


def _bad_words(value: Any) -> list[str]:
    found = None if isinstance(plain(value), str) else listed(value)
    texts = None if found is None else [text(one) for one in found]
    if texts is None or not all(one and one.strip() for one in texts):
        raise RequestError(f"bad_words is {shown(value)}; it must be a list of strings, none of them blank")
    if len(texts) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words has {len(texts)} strings; it must be {MAX_BAD_WORDS} at most")
    return texts  # type: ignore[return-value]


def _logit_bias(value: Any) -> dict[int, float]:
    """Token ids may be given as text, since the keys of JSON are."""
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias is {shown(value)}; it must be a dict from token ids to numbers")
    found = {}
    for token, bias in value.items():
        is_text = isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 19
        found[integer("logit_bias", int(token) if is_text else token, 0)] = float(
            number("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        )
    return found
