"""Drafts by the model itself, which attends to resident pages alone: a part of the cache drafts for all of it
(TriForce, Sun et al. 2024, https://arxiv.org/abs/2404.11912)."""

from distkv.engine.speculation.hit_rates import PlaceRates


class SelfDrafter:
    """The draft of one answer, which grows by a token a step until it is checked."""

    def __init__(self, rates: PlaceRates):
        """`rates` are those of all answers, by the place in a draft, which its own begin with."""
        self._rates = PlaceRates(rates)
        self._tokens: list[int] = []
        self._count = 0  # tokens of prompt and answer that the draft stands behind
        self.has_ended = False  # nothing may come behind it

    @property
    def num_tokens(self) -> int:
        """Of the draft so far."""
        return len(self._tokens)

    def read(self, token_ids: list[int]) -> None:
        """Takes note of the tokens of prompt and answer, which begin with those that it was told before. When some have
        come the draft is done with."""
        if len(token_ids) == self._count:
            return
        came = token_ids[self._count : self._count + len(self._tokens)]
        agrees = [drafted == token for drafted, token in zip(self._tokens, came, strict=False)]
        self._rates.note_draft(len(agrees), [*agrees, False].index(False))
        self._tokens, self._count, self.has_ended = [], len(token_ids), False

    def add(self, token_id: int | None) -> None:
        """One more token of the draft, None where none can come."""
        if token_id is None:
            self.has_ended = True
        else:
            self._tokens.append(token_id)

    def draft(self, most: int) -> list[int]:
        """The first tokens of the draft, at most so many."""
        return self._tokens[:most]

    def chances(self, most: int) -> list[float]:
        """For each of so many tokens of the draft, with those that are still to be found, how likely it comes, with all
        before it."""
        return self._rates.chances(1, most)
