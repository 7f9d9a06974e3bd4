"""What a request returns. Names are vLLM's."""

from dataclasses import dataclass

from distkv.errors import DistKVError


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model's own distribution."""

    logprob: float
    rank: int  # 1 is the likeliest
    decoded_token: str | None  # None when the model has no tokenizer


@dataclass(frozen=True)
class CompletionOutput:
    """One answer of a request.

    `logprobs`, when asked for, has a table per token: token id -> Logprob, the drawn token among them.
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
    """A request and its answers so far; complete when `finished`."""

    request_id: str
    prompt: str | None  # None when the prompt was given as tokens
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: DistKVError | None = None  # why it could not go on
