"""Answers that keep to a grammar, by llguidance: which tokens may come next."""

from collections.abc import Callable, Sequence
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

    def allowed(self, tokens: list[int], draft: Sequence[int] = ()) -> np.ndarray | None:
        """Takes the next tokens of the answer; returns those that may follow as `TokenBits`, of which there are none
        where the library cannot go on. None behind the answer's end, where any may follow.

        Args:
            draft: tokens that may come behind these, and are not taken; the answer is about those that may follow them.
                Where they may not come themselves, any may follow.
        """
        for token in tokens:
            self.num_tokens += 1
            self._has_ended |= self._is_end(token)
            if not self._has_ended:
                self._matcher.consume_token(token)
        if self._has_ended or any(map(self._is_end, draft)):
            return None
        matcher = self._matcher
        if draft:
            matcher = matcher.deep_copy()
            if matcher.try_consume_tokens(list(draft)) < len(draft):
                return None
        octets = np.zeros(8 * len(self._ends), dtype=np.uint8)
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)[: len(octets)]
        octets[: len(mask)] = mask
        bits = octets.view("<u8")
        if matcher.is_error():
            self.error = matcher.get_error()
            return np.zeros_like(bits)
        word, bit = self._end // 64, np.uint64(1 << self._end % 64)
        if bits[word] & bit:
            bits[word] &= ~bit
            bits |= self._ends
        return bits

    def _is_end(self, token: int) -> bool:
        return token < 0 or bool(self._ends[token // 64] >> np.uint64(token % 64) & np.uint64(1))
