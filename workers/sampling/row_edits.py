"""What a request has done to the logits of one of its rows before a token is sampled, beside penalties; without a
tensor, for the leader writes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distkv.workers.sampling.grammar import Grammar

WORD_BITS = 64

TokenBits = np.ndarray
"""A set of token ids: uint64 of little endian, bit `id % 64` of word `id // 64`, with a word for the last token."""


def token_bits(token_ids: Sequence[int], vocab_size: int) -> TokenBits:
    """The set of these tokens."""
    members = np.zeros(-(-vocab_size // WORD_BITS) * WORD_BITS, dtype=bool)
    members[token_ids] = True
    return np.packbits(members, bitorder="little").view("<u8")


@dataclass(slots=True)
class RowEdits:
    """What is done to the logits of one row."""

    biases: dict[int, float] = field(default_factory=dict)  # are added, by token
    forbidden: list[int] = field(default_factory=list)  # tokens
    forbidden_after: list[tuple[int, int]] = field(default_factory=list)  # (token, pending one that it may not follow)
    allowed: TokenBits | None = None  # None: all that is not forbidden
    grammar: Grammar | None = None
    grammar_tokens: list[int] = field(default_factory=list)  # the answer's tokens that the grammar does not know yet
    grammar_draft: list[int] = field(default_factory=list)  # tokens behind them that may be the answer's

    def resolve_grammar(self, pending: int | None) -> None:
        """Narrows `allowed` by the grammar, once, given the token of the answer that was pending."""
        if self.grammar is None:
            return
        tokens = self.grammar_tokens if pending is None else [*self.grammar_tokens, pending]
        allowed = self.grammar.allowed(tokens, self.grammar_draft)
        self.grammar = None
        if allowed is not None:
            self.allowed = allowed if self.allowed is None else self.allowed & allowed
