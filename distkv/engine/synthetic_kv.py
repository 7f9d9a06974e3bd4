"""Prefixes whose keys and values are random numbers: a context of any length without its prefill, for stress tests."""

from dataclasses import dataclass

from distkv.storage.ledger.page import Page


@dataclass(frozen=True)
class SyntheticKV:
    """The first `num_tokens` tokens of a prompt, whole pages, which no step reads: their pages are filled with random
    numbers instead."""

    seed: int = 0
    num_tokens: int = 0

    def covers(self, position: int) -> bool:
        """Whether the token at a position is one of them."""
        return position < self.num_tokens

    def num_left(self, num_done: int) -> int:
        """Tokens that have still to be filled when the first `num_done` of the sequence have their pages."""
        return max(0, self.num_tokens - num_done)

    def page_seed(self, index: int) -> int:
        """The seed of the numbers of page `index`, see `synthetic_slice`."""
        return (self.seed << 32) + index

    def fills(self, pages: list[Page]) -> list[tuple[int, int]]:
        """What a plan says of pages on the device that are to be filled: slot and seed of each."""
        return [(page.location, self.page_seed(page.index)) for page in pages]
