"""What a request returns. Names are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distkv.errors import DistKVError


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model's own distribution."""

    logprob: float
    rank: int  # 1 is the likeliest
    decoded_token: str | None  # None when the model has no tokenizer


@dataclass(frozen=True)
class CompletionOutput:
    """One answer of a request, or with `RequestOutputKind.DELTA` what is new of it: `text`, `token_ids` and `logprobs`.

    `logprobs`, when asked for, has a table per token: token id -> Logprob, the sampled token among them.
    `cumulative_logprob` is the sum over all tokens so far, whatever the kind.
    `finish_reason` is "stop" (an end token or a stop string, named in `stop_reason`), "length", "error" when the
    request could not go on, or None while it runs.
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
    """A request and its answers, as `SamplingParams.output_kind` has it; the last output is `finished`.

    `num_cached_tokens_by_tier` says how many tokens of the prompt had their KV taken over from earlier requests, by
    where it was found: "device", "host" and "disk". It is known from the first token on.

    `prompt_logprobs`, when asked for, has a table as `CompletionOutput.logprobs` has for each token of the prompt, and
    None for the first one, which follows nothing. With DELTA the first output alone has it, and no output of a request
    that failed before its prompt was read.

    `kv_policy` names the options by which the answer may differ from that of the whole and exact cache, such as
    `top_pages(share=0.1), kv_cache_dtype=int8`, see `EngineConfig`; None where there are none.
    """

    request_id: str
    prompt: str | None  # None when the prompt was given as tokens
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: DistKVError | None = None  # why it could not go on, or with a session why its answer was not kept
    num_cached_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    kv_policy: str | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt whose KV was not computed again, in all tiers together."""
        return sum(self.num_cached_tokens_by_tier.values())


def join_deltas(deltas: Sequence[RequestOutput]) -> RequestOutput:
    """The cumulative output that the deltas of a request add up to, given from the first one on, at least one.

    They need not go on to the end: the answers then are what was yielded of them.
    """
    parts: dict[int, list[CompletionOutput]] = {}
    for delta in deltas:
        for part in delta.outputs:
            parts.setdefault(part.index, []).append(part)
    return replace(
        deltas[-1],
        outputs=[_join_parts(parts[index]) for index in sorted(parts)],
        prompt_logprobs=next((one.prompt_logprobs for one in deltas if one.prompt_logprobs is not None), None),
    )


def _join_parts(parts: list[CompletionOutput]) -> CompletionOutput:
    """An answer from its parts in their order."""
    last = parts[-1]
    return replace(
        last,
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=None if last.logprobs is None else [table for part in parts for table in part.logprobs or []],
    )


@dataclass(frozen=True)
class PromptExport:
    """How much of a prompt or session is in a file of `LLM.export_cache`."""

    name: str  # "prompt 1", "session trip"
    num_tokens: int  # that it has
    num_exported: int  # of these, from the first one on


@dataclass(frozen=True)
class CacheExport:
    """What `LLM.export_cache` has written."""

    num_pages: int
    num_tokens: int
    num_bytes: int  # of pages
    prompts: list[PromptExport]


@dataclass(frozen=True)
class CacheImport:
    """What `LLM.import_cache` has taken in."""

    num_pages: int  # that the file has
    num_new: int  # of these were not there before
