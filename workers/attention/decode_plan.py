"""Which splits the decode kernel computes in which launch, as plain arrays.

A split is DECODE_SPLIT tokens of a sequence, or a page where that is larger. Its boundaries follow from the page grid
alone. A split is streamed when any of its pages is cold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from distkv.storage.paging import DECODE_SPLIT
from distkv.workers.attention.step_loads import Member, StepLoads


@dataclass(frozen=True)
class DecodeRound:
    """Splits whose states are held at a time; a sequence's splits go through the rounds in logical order."""

    # [B, 6]: first row of the step, keys, first entry of the table, state of split 0 (negative when that was a round
    # before), first split and end of the splits of this round
    sequences: np.ndarray
    items: np.ndarray  # [N, 2]: (row of `sequences`, split); the resident splits, then those of each load
    num_items: list[int]  # of the resident splits, then of each load
    loads: list[int]  # the numbers of those that bring pages of these splits, see `StepLoads`
    num_states: int


@dataclass(frozen=True)
class DecodePlan:
    """Sequences with the same number of new tokens."""

    num_tokens: int  # new ones of each sequence
    table: np.ndarray  # where each page of each sequence lies, see `StepLoads`
    rounds: list[DecodeRound]  # each goes on with the last load of the one before, or with later ones


def split_pages_for(page_size: int) -> int:
    """Pages of a split."""
    return max(1, DECODE_SPLIT // page_size)


def plan_decode(
    num_tokens: int, members: list[Member], first: int, brought: StepLoads, page_size: int, max_states: int,
    merge_tile: int, num_padding: int = 0,
) -> DecodePlan:  # fmt: skip
    """Plans the attention of sequences with `num_tokens` new tokens each.

    Args:
        first: index of the first of them among the sequences of `brought`, where they follow one another.
        max_states: most states that a round may hold: `merge_tile` for each sequence of a batch of theirs, at least.
        merge_tile: rounds end between tiles of so many states of a sequence, or at its end.
        num_padding: rows of the step behind those of all members that stand for nobody, one for each sequence.
    """
    split_pages = split_pages_for(page_size)
    mine = slice(first, first + len(members))
    num_pages, cells = brought.num_pages[mine], brought.first_cell[mine]
    entries = slice(brought.first_entry[first], brought.first_entry[first] + num_pages.sum())
    first_entry = brought.first_entry[mine] - entries.start
    num_keys = np.array([step.start + num_tokens for _, step in members], dtype=np.int64)
    num_splits = -(-num_pages // split_pages)
    first_split = np.cumsum(num_splits) - num_splits  # numbers over all sequences
    owner = np.repeat(np.arange(len(members)), num_pages)
    split_of_entry = first_split[owner] + (np.arange(len(owner)) - first_entry[owner]) // split_pages
    is_cold = np.zeros(num_splits.sum(), dtype=bool)
    is_cold[split_of_entry[brought.is_cold[entries]]] = True

    rounds = []
    for here, begins, ends in _cut(num_splits, brought.batches[mine], max_states, merge_tile):
        counts = ends - begins
        first_state = np.cumsum(counts) - counts
        rows = np.array([members[member][0] for member in here])
        columns = [rows, num_keys[here], first_entry[here], first_state - begins, begins, ends]
        row = np.repeat(np.arange(len(here)), counts)
        split = np.arange(len(row)) - first_state[row] + begins[row]
        cell = cells[here][row] + split * split_pages // brought.cell_pages
        load = np.where(is_cold[first_split[here][row] + split], brought.load_of_cell[cell], -1)
        order = np.argsort(load, kind="stable")
        numbers, num_items = np.unique(load[load >= 0], return_counts=True)
        num_items = np.append((load < 0).sum(), num_items)
        items = np.stack([row, split], 1)[order]
        rounds.append(DecodeRound(np.stack(columns, 1), items, num_items.tolist(), numbers.tolist(), len(row)))
    if num_padding:
        padding = np.zeros((num_padding, 6), dtype=np.int64)
        padding[:, 0] = members[-1][0] + num_tokens + np.arange(num_padding) * num_tokens
        rounds[0] = replace(rounds[0], sequences=np.concatenate([rounds[0].sequences, padding]))
    return DecodePlan(num_tokens, brought.table[entries], rounds)


def _cut(
    num_splits: np.ndarray, batches: np.ndarray, max_states: int, merge_tile: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The sequences of each round, with the first split and the end of each in it. Those of a batch go through their
    tiles side by side, so that loads are met in order."""
    num_tiles = -(-num_splits // merge_tile)
    owner = np.repeat(np.arange(len(num_splits)), num_tiles)
    tile = np.arange(len(owner)) - (np.cumsum(num_tiles) - num_tiles)[owner]
    order = np.lexsort([owner, tile, batches[owner]])
    owner, tile = owner[order], tile[order]
    sizes = np.minimum(num_splits[owner] - tile * merge_tile, merge_tile)
    # tiles of one number and batch stay together
    is_first = (np.diff(tile, prepend=-1) != 0) | (np.diff(batches[owner], prepend=-1) != 0)
    edges = np.append(np.flatnonzero(is_first), len(owner))
    reached = np.append(0, np.cumsum(sizes))[edges]  # states before each of them
    done = 0
    while done < len(edges) - 1:
        end = int(np.searchsorted(reached, reached[done] + max_states, "right")) - 1
        part = slice(edges[done], edges[end])
        here, at = np.unique(owner[part], return_index=True)
        first = tile[part][at] * merge_tile
        count = np.bincount(owner[part], sizes[part], len(num_splits)).astype(np.int64)[here]
        yield here, first, first + count
        done = end
