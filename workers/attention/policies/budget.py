"""How many pages a token may attend to: a number of them, or a share of those up to its own."""

from fractions import Fraction
from typing import TYPE_CHECKING

from distkv.workers.attention.policies.policy import check_count
from distkv.workers.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_SHARE = 0.1
LEAST = 2  # the first page and the row's own


def checked_share(policy: str, share: float | None, pages: int | None) -> float | None:
    """The share where `pages` is not given, DEFAULT_SHARE if neither is. Raises ConfigError for what is no budget."""
    if share is not None and pages is not None:
        raise ConfigError(f"attention_policy {policy}: share and pages are both given; leave one of them out")
    if pages is not None:
        check_count(policy, "pages", pages, LEAST)
        return None
    share = DEFAULT_SHARE if share is None else share
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
        raise ConfigError(f"attention_policy {policy}: share is {share!r}; use a number above 0 and at most 1")
    return float(share)


def pages_within(share: float | None, pages: int | None, num_pages: int) -> int:
    """How many of so many pages one of the two allows: the share rounded up, LEAST at least where there are so many."""
    if pages is not None:
        return min(num_pages, pages)
    part = Fraction(str(share)) * num_pages  # a float's product may lie a little above a whole number
    return min(num_pages, max(LEAST, -(-part.numerator // part.denominator)))


def highest(numbers: "np.ndarray", count: int) -> "np.ndarray":
    """The indexes of the `count` highest of some more numbers, rising; of equal ones the first."""
    import numpy as np  # see policy.py

    if not count:
        return np.zeros(0, dtype=np.int64)
    numbers = np.nan_to_num(numbers, nan=np.inf)  # of keys that are no numbers, whose request ends
    least = np.partition(numbers, len(numbers) - count)[len(numbers) - count]
    chosen = numbers > least
    chosen[np.flatnonzero(numbers == least)[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)
