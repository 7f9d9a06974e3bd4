"""Where drafts come from: the one interface of all methods."""

from typing import Protocol

from distkv.engine.sequence import Sequence


class Drafts(Protocol):
    """Drafts for all sequences, by one method."""

    is_free: bool
    """Whether it takes no time, and is guessed too where there is no draft."""

    @property
    def cost(self) -> tuple[float, float]:
        """Seconds that drafting for a step takes before its first token, and those of each drafted token."""

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        """For each of so many tokens of a draft, how likely it comes, with all before it; none where there is no
        draft."""
        ...

    def draft(self, wanted: list[tuple[Sequence, int]]) -> None:
        """Sets `Sequence.draft` of sequences whose newest token is known, each to so many tokens at most, one at
        least."""

    def checked(self, sequence: Sequence, num_drafted: int, num_right: int) -> None:
        """A step has found that of a draft the first so many tokens were right."""
