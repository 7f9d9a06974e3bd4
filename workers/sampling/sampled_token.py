"""A token that was sampled, as the leader receives it; without a tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the model's own distribution, before penalties, temperature and truncation."""

    logprob: float  # of the sampled token
    rank: int  # of the sampled token, 1 is the likeliest
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first, of equal ones the lowest id first


SampledToken = tuple[int, TokenLogprobs | None]
"""Its id, or NO_TOKEN, and its log-probabilities where they were asked for."""

NO_TOKEN = -1
"""There is none, for its logits are no numbers to choose by: one is NaN or +inf, or all are -inf."""
