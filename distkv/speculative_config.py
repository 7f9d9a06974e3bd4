"""How tokens are drafted, to be checked several in a step. Names are vLLM's, and so is the shape."""

from pathlib import Path
from typing import Any

import msgspec

from distkv.errors import ConfigError
from distkv.option_checks import parse_bytes, settle_path
from distkv.values import plain, shown

MAX_DRAFT = 7
"""Most tokens of a draft: with the token before them as many as attend the way of an answer, `MAX_DECODE_TOKENS`, at
hardly more than the cost of one where they read a long context."""

METHODS = {"ngram": ("prompt_lookup_min", "prompt_lookup_max"), "self": (), "draft_model": ("model", "draft_kv_bytes")}
"""With the fields that are theirs alone."""


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `speculative_config` is made of. Answers are the same with any of it, bit for bit, so it is no part of any
    fingerprint."""

    method: str
    """ngram: what followed the newest tokens of the context where they stood before (prompt lookup, Saxena 2023,
    https://github.com/apoorvumang/prompt-lookup-decoding). self: what the model says when it attends to the
    pages on the device alone (TriForce, Sun et al. 2024, https://arxiv.org/abs/2404.11912). draft_model: what a small
    model goes on with (Leviathan et al. 2022, https://arxiv.org/abs/2211.17192)."""
    num_speculative_tokens: int = MAX_DRAFT
    """Most tokens of a draft, from 1 to 7."""
    adaptive: bool = True
    """Whether drafts are as long as pays, by how many of their tokens prove right and what a step with more of them
    takes. False always drafts as many as there may be."""
    prompt_lookup_min: int | None = None
    """Fewest newest tokens that must have stood in the context before; None is 2, or `prompt_lookup_max` where that is
    less."""
    prompt_lookup_max: int | None = None
    """Most of them that are looked for; of several places the one that agrees in most of them is taken, and of those
    that agree in as many the last. None is 8, or `prompt_lookup_min` where that is more."""
    model: str | None = None
    """Folder of the small model, whose tokenizer is the large one's."""
    draft_kv_bytes: int | str | None = None
    """Memory of rank 0's device for its keys and values; None is for `max_model_len` tokens. Sequences share it, and
    the one that drafted last has what it needs."""

    @classmethod
    def parse(cls, value: Any) -> "SpeculativeConfig":
        """What a user has given: a dict, or the same as JSON. Raises ConfigError for what it cannot be."""
        if isinstance(value, cls):
            return value
        try:
            value = msgspec.json.decode(value) if isinstance(value, str | bytes) else value
            numbers = {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value
            found = msgspec.convert(numbers, cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"speculative_config is {shown(value)}: {error}; give an object such as "
                '{"method": "ngram", "num_speculative_tokens": 7}'
            ) from error
        found._check()
        return found

    @property
    def lookup_sizes(self) -> tuple[int, int]:
        """`prompt_lookup_min` and `prompt_lookup_max`, or what stands for them."""
        least, most = self.prompt_lookup_min, self.prompt_lookup_max
        return (min(2, most or 2) if least is None else least), (max(8, least or 8) if most is None else most)

    def _check(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"speculative_config has method {shown(self.method)}; use one of {', '.join(METHODS)}")
        for method, names in METHODS.items():
            for name in names if method != self.method else ():
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"speculative_config has {name}, which goes with method {method} and not {self.method}; leave "
                        "it out"
                    )
        for name, number, low, high in (
            ("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_DRAFT),
            ("prompt_lookup_min", self.lookup_sizes[0], 1, self.lookup_sizes[1]),
            ("prompt_lookup_max", self.lookup_sizes[1], 1, 64),
        ):
            if not low <= number <= high:
                raise ConfigError(f"speculative_config has {name} {number}; it must be an integer from {low} to {high}")
        if self.method == "draft_model":
            if self.model is None:
                raise ConfigError('speculative_config has method draft_model; name its folder, "model": "path"')
            msgspec.structs.force_setattr(self, "model", str(settle_path("speculative_config's model", self.model)))
            if self.draft_kv_bytes is not None:
                size = parse_bytes("speculative_config's draft_kv_bytes", self.draft_kv_bytes)
                msgspec.structs.force_setattr(self, "draft_kv_bytes", size)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else plain(value)
