"""What a request returns. Names are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from distkv.errors import DistKVError


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model's own distribution."""

    logprob: float
    rank: int  # 1 is the likeliest
    decoded_token: str | None  # None when the model has no tokenizer


@dataclass(frozen=True)
class CompletionOutput:
    """One answer of a request: all of it so far, or what is new in it, see `SamplingParams.output_kind`.

    `logprobs`, when asked for, has a table per token: token id -> Logprob, the sampled token among them.
    `finish_reason` is "stop" (an end token or a stop string, named in `stop_reason`), "length", "error" when the
    request could not go on, or None while it runs. `cumulative_logprob` is of the whole answer in a delta too.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its answers so far; complete when `finished`. A delta has the answers alone that have grown.

    `num_cached_tokens_by_tier` says how many tokens of the prompt had their KV taken over from earlier requests, by
    where it was found: "device", "host" and "disk". It is known from the first token on.
    """

    request_id: str
    prompt: str | None  # None when the prompt was given as tokens
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: DistKVError | None = None  # why it could not go on
    num_cached_tokens_by_tier: dict[str, int] = field(default_factory=dict)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt whose KV was not computed again, in all tiers together."""
        return sum(self.num_cached_tokens_by_tier.values())


def join_deltas(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """What the deltas of one request say together: the answers so far, in order of their indexes.

    Args:
        outputs: at least one, all of them up to the last one that counts.
    """
    parts: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        for part in output.outputs:
            parts.setdefault(part.index, []).append(part)
    return replace(outputs[-1], outputs=[_join(parts[index]) for index in sorted(parts)])


def _join(parts: list[CompletionOutput]) -> CompletionOutput:
    tables = [part.logprobs for part in parts if part.logprobs is not None]
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=list(chain.from_iterable(part.token_ids for part in parts)),
        logprobs=list(chain.from_iterable(tables)) if tables else None,
    )
