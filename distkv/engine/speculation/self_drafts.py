"""Drafts by the model itself, for all sequences."""

from distkv.engine.sequence import Sequence
from distkv.engine.speculation.hit_rates import PlaceRates
from distkv.engine.speculation.self_drafter import SelfDrafter


class SelfDrafts:
    """`Drafts` whose tokens are found by steps before; what those take is not counted here."""

    is_free, cost = False, (0.0, 0.0)

    def __init__(self) -> None:
        self._rates = PlaceRates()

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        """See `Drafts`: also of tokens that are still to be drafted."""
        return self.of(sequence).chances(most)

    def draft(self, wanted: list[tuple[Sequence, int]]) -> None:
        for sequence, most in wanted:
            sequence.draft = self.of(sequence).draft(most)

    def checked(self, sequence: Sequence, num_drafted: int, num_right: int) -> None:
        """The drafter sees that by itself."""

    def of(self, sequence: Sequence) -> SelfDrafter:
        """The draft of a sequence, behind its newest token."""
        if sequence.drafter is None:
            sequence.drafter = SelfDrafter(self._rates)
        assert isinstance(sequence.drafter, SelfDrafter)
        sequence.drafter.read(sequence.token_ids)
        return sequence.drafter
