"""How long an answer is likely to become, by those that have ended before it."""

from bisect import bisect_right, insort
from collections import deque
from itertools import accumulate

FIRST_GUESS = 256  # tokens beyond what is written, at least, as long as no answer has become longer
NUM_KEPT = 256  # answers, the last ones, so that it follows the traffic


class AnswerLengths:
    """Tokens of the last answers that ended by themselves, by an end token, a stop string or their limit."""

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []
        self._totals = [0]  # of the longest so many

    def add(self, length: int) -> None:
        """An answer has ended."""
        if len(self._last) == NUM_KEPT:
            self._sorted.pop(bisect_right(self._sorted, self._last.popleft()) - 1)
        self._last.append(length)
        insort(self._sorted, length)
        self._totals = [0, *accumulate(reversed(self._sorted))]

    def expected(self, written: int) -> int:
        """Tokens that an answer of `written` tokens so far is likely to end with: the mean of those that became longer.
        A first guess counts as one of these: as much again as is written, FIRST_GUESS at least."""
        num_longer = len(self._sorted) - bisect_right(self._sorted, written)
        guess = written + max(written, FIRST_GUESS)
        return (self._totals[num_longer] + guess) // (num_longer + 1)
