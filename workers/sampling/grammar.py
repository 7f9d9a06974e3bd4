"""Answers that keep to a grammar, by llguidance: which tokens may come next."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammar:
    """Where an answer stands in its grammar. Its masks are a function of the grammar and of the answer's tokens."""

    def __init__(self, make_matcher: "Callable[[], LLMatcher]", end: int, ends: np.ndarray):
        """
        Args:
            make_matcher: makes the library's own, at the beginning of the grammar.
            end: the token that the library allows where an answer may end.
            ends: the tokens that end the answer in its place, as `TokenBits`.
        """
        self.num_tokens = 0  # of the answer that it has been told
        self.error = ""  # why it cannot go on
        self._make_matcher = make_matcher
        self._matcher = make_matcher()
        self._end, self._ends = end, ends
        self._has_ended = False

    def fresh(self) -> "Grammar":
        """The same grammar at its beginning, for another answer."""
        return Grammar(self._make_matcher, self._end, self._ends)

    def allowed(self, tokens: list[int]) -> np.ndarray | None:
        """Takes the next tokens of the answer; returns those that may follow as `TokenBits`, of which there are none
        where the library cannot go on. None behind the answer's end, where any may follow."""
        for token in tokens:
            self.num_tokens += 1
            self._has_ended |= token < 0 or bool(self._ends[token // 64] >> np.uint64(token % 64) & np.uint64(1))
            if not self._has_ended:
                self._matcher.consume_token(token)
        if self._has_ended:
            return None
        octets = np.zeros(8 * len(self._ends), dtype=np.uint8)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(octets)]
        octets[: len(mask)] = mask
        bits = octets.view("<u8")
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return np.zeros_like(bits)
        word, bit = self._end // 64, np.uint64(1 << self._end % 64)
        if bits[word] & bit:
            bits[word] &= ~bit
            bits |= self._ends
        return bits
