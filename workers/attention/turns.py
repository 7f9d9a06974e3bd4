"""In which turns the tokens of a step choose their pages.

By a `RowPolicy` all choose at once. By a `SequentialPolicy` a token of an answer chooses when those before it in its
sequence have attended: the first tokens of all sequences together, then the second ones. Tokens of a prompt that it
observes attend to everything, so those of one page share their choice, and all have one turn, before the others.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distkv.workers.attention.chosen_pages import ChosenCalls, ChosenPages
from distkv.workers.attention.policies.policy import Choice
from distkv.workers.page_directory import SequenceStep


@dataclass(frozen=True)
class Choosers:
    """Tokens of one sequence that choose in a step, in a turn of it, or together."""

    step: SequenceStep
    positions: np.ndarray  # int64, rising
    rows: slice  # of all that choose in the step

    def part(self, first: int, end: int) -> "Choosers":
        """Those from one on, up to another."""
        return Choosers(self.step, self.positions[first:end], slice(self.rows.start + first, self.rows.start + end))


class Turn:
    """Tokens that attend together; each chooses for itself, or those of one of `choosers` together."""

    def __init__(self, choosers: list[Choosers], page_size: int, num_kv_heads: int, observed: bool = False):
        """`observed`: they are of prompts, and share the choice of everything."""
        self.choosers, self.observed = choosers, observed
        self.calls: ChosenCalls | None = None  # where they are the same in all layers
        self.all_calls: ChosenCalls | None = None  # where everything is chosen, for an audit
        units = choosers if observed else [one.part(i, i + 1) for one in choosers for i in range(len(one.positions))]
        starts = np.array([one.positions[0] for one in units], dtype=np.int64)
        self._page_size, self._num_kv_heads = page_size, num_kv_heads
        self._own_pages = starts // page_size
        self._steps = [one.step for one in units]
        self._first_rows = np.array([one.rows.start for one in units], dtype=np.int64)
        # of choices, those of the KV heads of a unit one after the other
        self._heads = np.tile(np.arange(num_kv_heads), len(units))
        self._num_tokens = np.repeat([len(one.positions) for one in units], num_kv_heads)
        self._offsets = np.repeat(starts % page_size, num_kv_heads)

    @property
    def num_visible(self) -> int:
        """Pages that they could choose from, for each KV head."""
        return int((self._own_pages + 1).sum()) * self._num_kv_heads

    def everything(self) -> Choice:
        """All pages up to the own one of each."""
        return [[np.arange(own + 1)] * self._num_kv_heads for own in self._own_pages.tolist()]

    @cached_property
    def order(self) -> Tensor:
        """Where the query heads of KV heads are to be taken from, all rows that choose in the step having theirs one
        after the other: those of a choice are together."""
        tokens, first_rows = self._num_tokens, np.repeat(self._first_rows, self._num_kv_heads)
        offsets = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        rows = np.repeat(first_rows, tokens) + offsets
        return torch.from_numpy(rows * self._num_kv_heads + np.repeat(self._heads, tokens))

    def gather(self, choice: Choice, own: np.ndarray | None) -> ChosenPages:
        """What they have chosen, that of the KV heads one after the other.

        Args:
            own: by row that chooses in the step, the index of its own page in `CodedPages`, or -1; None without codec.
        """
        indexes = [pages for unit in choice for pages in unit]
        locations = [step.pages[pages] for step, unit in zip(self._steps, choice, strict=True) for pages in unit]
        exact = np.full(len(indexes), -1)
        if own is not None:
            index = np.repeat(own[self._first_rows], self._num_kv_heads)
            exact = np.where(index < 0, -1, index * self._num_kv_heads + self._heads)
        return ChosenPages(
            np.concatenate(locations), np.concatenate(indexes), np.array([len(pages) for pages in indexes]),
            self._heads, self._num_tokens, self._offsets, exact,
        )  # fmt: skip


def plan_turns(choosers: list[Choosers], page_size: int, num_kv_heads: int, is_sequential: bool) -> list[Turn]:
    """The turns of the tokens of some sequences; without any, none."""
    if not choosers:
        return []
    if not is_sequential:
        return [Turn(choosers, page_size, num_kv_heads)]
    observed: list[Choosers] = []
    answers: list[Choosers] = []
    for one in choosers:
        num_observed = int(np.searchsorted(one.positions, one.step.prompt_len))
        borders = [0, *(np.flatnonzero(one.positions[1:num_observed] % page_size == 0) + 1).tolist(), num_observed]
        if num_observed:
            observed += [one.part(first, end) for first, end in pairwise(borders)]
        answers.append(one.part(num_observed, len(one.positions)))
    turns = [Turn(observed, page_size, num_kv_heads, observed=True)] if observed else []
    for index in range(max(len(one.positions) for one in answers)):
        parts = [one.part(index, index + 1) for one in answers if index < len(one.positions)]
        turns.append(Turn(parts, page_size, num_kv_heads))
    return turns
