"""How tokens are drafted, to be checked several in a step. Names are vLLM's, and so is the shape."""

from typing import Any

import msgspec

from distkv.errors import ConfigError
from distkv.values import plain, shown

MAX_DRAFT = 8
"""Most tokens of a draft: so many rows, with the token before them, a step attends for at hardly more than the cost of
one where it reads a long context."""

METHODS = ("ngram",)


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `speculative_config` is made of. Answers are the same with any of it, bit for bit, so it is no part of any
    fingerprint."""

    method: str
    """ngram: what followed the newest tokens of the context where they stood before (prompt lookup, Saxena 2023,
    https://github.com/apoorvumang/prompt-lookup-decoding)."""
    num_speculative_tokens: int = MAX_DRAFT
    """Most tokens of a draft, from 1 to 8."""
    prompt_lookup_min: int = 2
    """Fewest newest tokens that must have stood in the context before."""
    prompt_lookup_max: int = 8
    """Most of them that are looked for; of several places the one that agrees in most of them is taken, and of those
    that agree in as many the last."""
    adaptive: bool = True
    """Whether drafts are as long as pays, by how many of their tokens prove right and what a step with more of them
    takes. False always drafts as many as there may be."""

    @classmethod
    def parse(cls, value: Any) -> "SpeculativeConfig":
        """What a user has given: a dict, or the same as JSON. Raises ConfigError for what it cannot be."""
        if isinstance(value, cls):
            return value
        try:
            value = msgspec.json.decode(value) if isinstance(value, str | bytes) else value
            numbers = {name: plain(one) for name, one in value.items()} if isinstance(value, dict) else value
            found = msgspec.convert(numbers, cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"speculative_config is {shown(value)}: {error}; give an object such as "
                '{"method": "ngram", "num_speculative_tokens": 8}'
            ) from error
        found._check()
        return found

    def _check(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"speculative_config has method {shown(self.method)}; use one of {', '.join(METHODS)}")
        for name, low, high in (
            ("num_speculative_tokens", 1, MAX_DRAFT),
            ("prompt_lookup_min", 1, self.prompt_lookup_max),
            ("prompt_lookup_max", 1, 64),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"speculative_config has {name} {getattr(self, name)}; it must be an integer from {low} to {high}"
                )
