"""What two engines say of the same tokens, compared: perplexity and Kullback-Leibler divergence."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from distkv.workers.sampling.sampled_token import TokenLogprobs

LEAST_REST = 1e-6  # of the mass of all tokens that are not listed; what is less is rounding


def perplexity(scores: Iterable[TokenLogprobs]) -> float:
    """exp of the mean negative log-probability of the text's own tokens."""
    return math.exp(-statistics.fmean(one.logprob for one in scores))


def divergence(token: int, exact: TokenLogprobs, other: TokenLogprobs) -> float:
    """KL(exact || other) of the distributions of a token, in nats, from below: the text's own token and those that both
    list among their likeliest count each by itself, and all others as one. To put outcomes together can only make a
    divergence smaller.

    Args:
        token: the text's own token.
    """
    ours, theirs = {token: exact.logprob, **dict(exact.top)}, {token: other.logprob, **dict(other.top)}
    both = ours.keys() & theirs.keys()
    total = math.fsum(math.exp(ours[one]) * (ours[one] - theirs[one]) for one in both)
    rest, their_rest = (max(LEAST_REST, 1 - math.fsum(math.exp(of[one]) for one in both)) for of in (ours, theirs))
    return total + rest * math.log(rest / their_rest)


def unlisted(scores: Sequence[TokenLogprobs]) -> float:
    """The mean probability of the tokens that are not among the likeliest ones listed."""
    return statistics.fmean(1 - math.fsum(math.exp(logprob) for _, logprob in one.top) for one in scores)


def means(values: Sequence[float], parts: int) -> list[float]:
    """The mean of each of so many parts of about equal length, in order."""
    borders = [len(values) * part // parts for part in range(parts + 1)]
    return [statistics.fmean(values[first:end]) for first, end in pairwise(borders)]
