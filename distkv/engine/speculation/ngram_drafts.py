"""Drafts by prompt lookup, for all sequences."""

from distkv.engine.sequence import Sequence
from distkv.engine.speculation.hit_rates import HitRates
from distkv.engine.speculation.ngram import NgramDrafter
from distkv.speculative_config import SpeculativeConfig


class NgramDrafts:
    """`Drafts` that cost nothing."""

    is_free, cost = True, (0.0, 0.0)

    def __init__(self, config: SpeculativeConfig):
        self._config = config
        self._rates = HitRates()

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        return self._drafter(sequence).chances(most)

    def draft(self, wanted: list[tuple[Sequence, int]]) -> None:
        for sequence, most in wanted:
            sequence.draft = self._drafter(sequence).draft(most)

    def checked(self, sequence: Sequence, num_drafted: int, num_right: int) -> None:
        """The drafter sees that by itself."""

    def _drafter(self, sequence: Sequence) -> NgramDrafter:
        if sequence.drafter is None:
            sequence.drafter = NgramDrafter(self._config, self._rates)
        assert isinstance(sequence.drafter, NgramDrafter)
        sequence.drafter.read(sequence.token_ids)
        return sequence.drafter
