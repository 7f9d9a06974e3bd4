"""Drafts by prompt lookup: what stood behind the newest tokens where they stood before (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding)."""

import numpy as np

from distkv.engine.speculation.hit_rates import HitRates
from distkv.speculative_config import SpeculativeConfig


class NgramDrafter:
    """Drafts for one answer. It guesses each token whether that is drafted or not, so that it knows how good it is for
    nothing."""

    def __init__(self, config: SpeculativeConfig, rates: HitRates):
        """`rates` are those of all answers, which its own begin with."""
        self._least, self._most = config.lookup_sizes
        self._rates = HitRates(rates)
        self._tokens = np.zeros(0, dtype=np.int32)  # with room behind
        self._count = 0
        self._next: int | None = None  # index of the token that is to come next, as it came before
        self._agreed = 0  # tokens before it that agree with the newest ones

    def read(self, token_ids: list[int]) -> None:
        """Takes note of the tokens of prompt and answer, which begin with those that it was told before."""
        new = token_ids[self._count :]
        if not new:
            return
        if self._count:
            for token in new:
                self._compare(token)
                self._append([token])
        else:
            self._append(new)
        if self._next is None:
            self._find()

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where the newest ones are new. What repeats itself goes on
        to."""
        if self._next is None:
            return []
        tokens = self._tokens[self._next : min(self._next + most, self._count)].tolist()
        for index in range(most - len(tokens)):
            tokens.append(tokens[index])
        return tokens

    def chances(self, most: int) -> list[float]:
        """For each of so many tokens of a draft, how likely it comes, with all before it; none where there is no
        draft."""
        return [] if self._next is None else self._rates.chances(self._agreed, most)

    def _compare(self, token: int) -> None:
        if self._next is None:
            return
        is_hit = int(self._tokens[self._next]) == token
        self._rates.note(self._agreed, is_hit)
        self._next, self._agreed = (self._next + 1, self._agreed + 1) if is_hit else (None, 0)

    def _append(self, new: list[int]) -> None:
        end = self._count + len(new)
        if end > len(self._tokens):
            grown = np.zeros(end + end // 4 + 64, dtype=np.int32)
            grown[: self._count] = self._tokens[: self._count]
            self._tokens = grown
        self._tokens[self._count : end] = new
        self._count = end

    def _find(self) -> None:
        """Looks for the newest tokens before their end."""
        tokens, end = self._tokens, self._count
        places = np.flatnonzero(tokens[: end - 1] == tokens[end - 1]) + 1  # of the token behind
        agreed = 1
        while len(places) and agreed < self._most:
            longer = places[places > agreed]
            longer = longer[tokens[longer - 1 - agreed] == tokens[end - 1 - agreed]]
            if not len(longer):
                break
            places, agreed = longer, agreed + 1
        if len(places) and agreed >= self._least:
            self._next, self._agreed = int(places[-1]), agreed
