"""How often a drafted token is the one that comes."""

from itertools import accumulate
from operator import mul

MEMORY = 0.95  # what a token counts when the next one of its class has come
BEFOREHAND = 2.0  # tokens that the prior counts as
PRIOR = 0.5
MOST_CLASSES = 6


class HitRates:
    """By how far the context has agreed with what the draft repeats, in classes that double: one that has agreed for
    long goes on to."""

    def __init__(self, before: "HitRates | None" = None):
        """`before` says what to expect as long as little is known."""
        self._before = before
        self._hits = [0.0] * MOST_CLASSES
        self._counts = [0.0] * MOST_CLASSES

    def note(self, agreed: int, is_hit: bool) -> None:
        """A token came behind `agreed` ones that agree; whether it was the one that was to come."""
        if self._before is not None:
            self._before.note(agreed, is_hit)
        index = _class_of(agreed)
        self._hits[index] = self._hits[index] * MEMORY + is_hit
        self._counts[index] = self._counts[index] * MEMORY + 1

    def rate(self, agreed: int) -> float:
        """The share of tokens that come as drafted, between 0 and 1."""
        index = _class_of(agreed)
        prior = self._prior(agreed) if self._before is None else self._before.rate(agreed)
        return (self._hits[index] + BEFOREHAND * prior) / (self._counts[index] + BEFOREHAND)

    def chances(self, agreed: int, most: int) -> list[float]:
        """For each of `most` tokens behind `agreed` ones that agree, how likely it comes, with all before it."""
        return list(accumulate((self.rate(agreed + index) for index in range(most)), mul))

    def _prior(self, agreed: int) -> float:
        return PRIOR


class PlaceRates(HitRates):
    """By the place in a draft, counted from 1, all before which were right. A place of which little is known is as good
    as those before it."""

    def note_draft(self, num_drafted: int, num_right: int) -> None:
        """Of so many drafted tokens the first `num_right` came, and the one behind them did not."""
        for place in range(1, min(num_right + 1, num_drafted) + 1):
            self.note(place, place <= num_right)

    def _prior(self, agreed: int) -> float:
        return self.rate(agreed // 2) if agreed > 1 else PRIOR


def _class_of(agreed: int) -> int:
    return min(agreed.bit_length(), MOST_CLASSES) - 1
