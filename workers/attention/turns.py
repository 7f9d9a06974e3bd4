"""In which turns the tokens of a step choose their pages.

By a `RowPolicy` all choose at once. By a `SequentialPolicy` a token of an answer chooses when those before it in its
sequence have attended: the first tokens of all sequences together, then the second ones. Tokens of a prompt that it
observes attend to everything, so those of one page share their choice, and all have one turn, before the others.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

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

    def __init__(self, choosers: list[Choosers], observed: bool = False):
        """`observed`: they are of prompts, and share the choice of everything."""
        self.choosers, self.observed = choosers, observed
        self.calls: ChosenCalls | None = None  # where they are the same in all layers
        self.all_calls: ChosenCalls | None = None  # where everything is chosen, for an audit
        units = choosers if observed else [one.part(i, i + 1) for one in choosers for i in range(len(one.positions))]
        self._steps = [one.step for one in units]
        self.starts = np.array([one.positions[0] for one in units], dtype=np.int64)
        self._num_tokens = np.array([len(one.positions) for one in units], dtype=np.int64)
        self._first_rows = np.array([one.rows.start for one in units], dtype=np.int64)

    def everything(self, page_size: int, num_kv_heads: int) -> Choice:
        """All pages up to the own one of each."""
        return [[np.arange(own + 1)] * num_kv_heads for own in (self.starts // page_size).tolist()]

    def order(self, num_kv_heads: int) -> np.ndarray:
        """Where the query heads of KV heads are to be taken from, all rows that choose in the step having theirs one
        after the other: those of a choice are together."""
        tokens = np.repeat(self._num_tokens, num_kv_heads)
        offsets = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        heads = np.tile(np.arange(num_kv_heads), len(self._num_tokens))
        first_rows = np.repeat(self._first_rows, num_kv_heads)
        return (np.repeat(first_rows, tokens) + offsets) * num_kv_heads + np.repeat(heads, tokens)

    def gather(self, choice: Choice, page_size: int, num_kv_heads: int, own: np.ndarray | None) -> ChosenPages:
        """What they have chosen, that of the KV heads one after the other.

        Args:
            own: by row that chooses in the step, the index of its own page in `CodedPages`, or -1; None without codec.
        """
        indexes = [pages for unit in choice for pages in unit]
        locations = [step.pages[pages] for step, unit in zip(self._steps, choice, strict=True) for pages in unit]
        counts = np.array([len(pages) for pages in indexes])
        heads = np.tile(np.arange(num_kv_heads), len(choice))
        exact = np.full(len(choice), -1) if own is None else own[self._first_rows]
        exact = np.repeat(exact, num_kv_heads)
        return ChosenPages(
            np.concatenate(locations), np.concatenate(indexes), counts, heads,
            np.repeat(self._num_tokens, num_kv_heads), np.repeat(self.starts % page_size, num_kv_heads),
            np.where(exact < 0, -1, exact * num_kv_heads + heads),
        )  # fmt: skip


def plan_turns(choosers: list[Choosers], page_size: int, is_sequential: bool) -> list[Turn]:
    """The turns of the tokens of some sequences; without any, none."""
    if not choosers:
        return []
    if not is_sequential:
        return [Turn(choosers)]
    observed: list[Choosers] = []
    answers: list[Choosers] = []
    for one in choosers:
        num_observed = int(np.searchsorted(one.positions, one.step.prompt_len))
        borders = [0, *(np.flatnonzero(one.positions[1:num_observed] % page_size == 0) + 1).tolist(), num_observed]
        if num_observed:
            observed += [one.part(first, end) for first, end in pairwise(borders)]
        answers.append(one.part(num_observed, len(one.positions)))
    turns = [Turn(observed, observed=True)] if observed else []
    for index in range(max(len(one.positions) for one in answers)):
        turns.append(Turn([one.part(index, index + 1) for one in answers if index < len(one.positions)]))
    return turns
