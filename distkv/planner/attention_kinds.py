"""What sharing KV heads saves: multi-head, grouped-query and multi-query attention of one shape side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distkv.errors import ConfigError
from distkv.option_checks import check_choice, check_whole
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest
from distkv.storage.dtypes import DTYPES, ITEM_BYTES

GUESSED = ("layers", "heads", "kv_heads", "head_dim")
"""What a guess at an unpublished configuration may say; `kv_heads` is `heads` if left out."""


@dataclass(frozen=True)
class AttentionKind:
    """A shape's attention with so many KV heads."""

    name: str  # MHA, GQA or MQA
    kv_heads: int
    is_own: bool  # whether the model has so many
    saving: float  # how many times less KV than with a KV head for each query head, by the plans of both
    plan: Plan


@dataclass(frozen=True)
class GuessedKv:
    """KV of a model whose configuration is not published, as far as guesses tell."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes_per_token: int


def attention_kinds(request: PlanRequest) -> list[AttentionKind]:
    """The request's model with a KV head for each query head, with 8 of them, with one, and as it is."""
    config = request.model.config
    heads, own = config.num_attention_heads, config.num_key_value_heads
    counts = {heads, own, 1} | ({8} if heads > 8 and heads % 8 == 0 else set())
    found: list[AttentionKind] = []
    for count in sorted(counts, reverse=True):
        name = "MHA" if count == heads else "MQA" if count == 1 else "GQA"
        model = replace(request.model, config=replace(config, num_key_value_heads=count))
        plan = make_plan(replace(request, model=model))
        most = (found[0].plan if found else plan).fit.kv_bytes_per_token
        found.append(AttentionKind(name, count, count == own, most / plan.fit.kv_bytes_per_token, plan))
    return found


def guessed_kv(guess: Mapping[str, int], dtype: str) -> GuessedKv:
    """KV of a token by guesses, see `GUESSED`. Raises ConfigError for one that lacks something or makes no sense."""
    unknown = [name for name in guess if name not in GUESSED]
    missing = [name for name in GUESSED if name not in guess and name != "kv_heads"]
    if unknown or missing:
        which = f"does not take {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise ConfigError(f"the guess {which}; give layers=...,heads=...,head_dim=... and, if shared, kv_heads=...")
    layers, heads, head_dim = (
        check_whole(f"{name} of the guess", guess[name]) for name in ("layers", "heads", "head_dim")
    )
    check_choice("dtype", dtype, DTYPES)
    kv_heads = check_whole("kv_heads of the guess", guess.get("kv_heads", heads), most=heads)
    return GuessedKv(layers, heads, kv_heads, head_dim, 2 * layers * kv_heads * head_dim * ITEM_BYTES[dtype])
