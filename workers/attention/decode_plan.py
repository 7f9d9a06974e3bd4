"""Which splits the decode kernel computes in which launch, as plain arrays.

A split is DECODE_SPLIT tokens of a sequence, or a page where that is larger. Its boundaries follow from the page grid
alone. A split is streamed when any of its pages is cold: then all its cold pages are brought by one load.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from distkv.kernels.page_entries import buffer_entry
from distkv.storage.moving.staging_ring import Load
from distkv.storage.paging import DECODE_SPLIT
from distkv.workers.page_directory import SequenceStep

Member = tuple[int, SequenceStep]
"""A sequence and its first row of the step."""


@dataclass(frozen=True)
class DecodeRound:
    """Splits whose states are held at a time; a sequence's splits go through the rounds in logical order."""

    # [B, 6]: first row of the step, keys, first entry of the table, state of split 0 (negative when that was a round
    # before), first split and end of the splits of this round
    sequences: np.ndarray
    items: np.ndarray  # [N, 2]: (row of `sequences`, split); the resident splits, then those of each load
    num_items: list[int]  # of the resident splits, then of each load
    loads: list[Load]
    num_states: int


@dataclass(frozen=True)
class DecodePlan:
    """Sequences with the same number of new tokens."""

    num_tokens: int  # new ones of each sequence
    table: np.ndarray  # where each page of each sequence lies: a device slot, or the `buffer_entry` of its load
    rounds: list[DecodeRound]


def split_pages_for(page_size: int) -> int:
    """Pages of a split."""
    return max(1, DECODE_SPLIT // page_size)


def plan_decode(
    num_tokens: int,
    members: list[Member],
    page_size: int,
    buffer_pages: int,
    max_states: int,
    merge_tile: int,
    num_padding: int = 0,
) -> DecodePlan:
    """Plans the attention of sequences with `num_tokens` new tokens each.

    Args:
        buffer_pages: pages of a buffer of the staging ring, a split's at least.
        max_states: most states that a round may hold, `merge_tile` at least.
        merge_tile: rounds end between tiles of so many states of a sequence, or at its end.
        num_padding: rows of the step behind those of all members that stand for nobody, one for each sequence.
    """
    split_pages = split_pages_for(page_size)
    num_keys = np.array([step.start + num_tokens for _, step in members], dtype=np.int64)
    num_pages = -(-num_keys // page_size)
    table = np.concatenate([step.pages[:count] for (_, step), count in zip(members, num_pages, strict=True)])
    first_entry = np.cumsum(num_pages) - num_pages
    num_splits = -(-num_pages // split_pages)
    first_split = np.cumsum(num_splits) - num_splits  # numbers over all sequences
    owner = np.repeat(np.arange(len(members)), num_pages)
    split_of_entry = first_split[owner] + (np.arange(len(table)) - first_entry[owner]) // split_pages
    is_cold = np.zeros(num_splits.sum(), dtype=bool)
    is_cold[split_of_entry[table < 0]] = True

    rounds = []
    for parts in _cut(num_splits.tolist(), max_states, merge_tile):
        sequences = np.zeros((len(parts), 6), dtype=np.int64)
        splits = [np.arange(first, end) for _, first, end in parts]
        items = np.stack([np.repeat(np.arange(len(parts)), [len(one) for one in splits]), np.concatenate(splits)], 1)
        num_states = 0
        for row, (member, first, end) in enumerate(parts):
            sequences[row] = (
                members[member][0], num_keys[member], first_entry[member], num_states - first, first, end
            )  # fmt: skip
            num_states += end - first
        member_of_row = np.array([member for member, _, _ in parts])
        cold = is_cold[first_split[member_of_row[items[:, 0]]] + items[:, 1]]
        launches, loads = [items[~cold]], []
        for load, chosen in _loads(items[cold], sequences, table, split_pages, page_size, buffer_pages):
            launches.append(chosen)
            loads.append(load)
        rounds.append(
            DecodeRound(sequences, np.concatenate(launches), [len(one) for one in launches], loads, num_states)
        )
    if num_padding:
        padding = np.zeros((num_padding, 6), dtype=np.int64)
        padding[:, 0] = members[-1][0] + num_tokens + np.arange(num_padding) * num_tokens
        rounds[0] = replace(rounds[0], sequences=np.concatenate([rounds[0].sequences, padding]))
    return DecodePlan(num_tokens, table, rounds)


def _cut(num_splits: list[int], max_states: int, merge_tile: int) -> Iterator[list[tuple[int, int, int]]]:
    """The parts `(sequence, first split, end)` of each round."""
    parts: list[tuple[int, int, int]] = []
    room = max_states
    for sequence, total in enumerate(num_splits):
        first = 0
        while first < total:
            end = total if total - first <= room else first + room // merge_tile * merge_tile
            if end > first:
                parts.append((sequence, first, end))
                room -= end - first
                first = end
            if first < total:
                yield parts
                parts, room = [], max_states
    yield parts


def _loads(
    items: np.ndarray, sequences: np.ndarray, table: np.ndarray, split_pages: int, page_size: int, buffer_pages: int
) -> list[tuple[Load, np.ndarray]]:
    """Loads of cold pages with the items that they serve; puts the entries of the buffer into the table.

    Splits with the same cold pages, such as those of a prefix that sequences share, are served by one load. Loads go by
    tier and slot, so that files are read from front to back. A context of a million tokens has thousands of pages, and
    nothing here is done page by page but for those that several splits have, each beside others.
    """
    if not len(items):
        return []
    (row, split), page = items.T, np.arange(split_pages)
    first = split * split_pages
    entries = (sequences[row, 2] + first)[:, None] + page  # [items, split_pages]
    inside = page < (-(-sequences[row, 1] // page_size) - first)[:, None]
    places = table[np.where(inside, entries, 0)]
    cold = inside & (places < 0)
    # the cold pages of each split to the left of its row, and the rows in order
    left = np.argsort(~cold, axis=1, kind="stable")
    places = np.take_along_axis(np.where(cold, places, _NONE), left, 1)
    order = np.lexsort((-places).T[::-1])
    places, entries = places[order], np.take_along_axis(entries, left, 1)[order]
    is_first = np.ones(len(items), dtype=bool)
    is_first[1:] = (places[1:] != places[:-1]).any(axis=1)
    groups = np.flatnonzero(is_first)  # rows of equal pages are served together
    pages, is_page = places[groups], places[groups] != _NONE
    ends = np.cumsum(is_page.sum(axis=1))
    pages = pages[is_page]

    before = _before(pages)
    index = np.zeros(len(pages), dtype=np.int64)  # in the buffer of its load
    loads: list[tuple[Load, np.ndarray]] = []
    group = done = 0
    bounds = np.append(groups, len(items))
    while group < len(groups):
        fresh = before[done : done + buffer_pages * split_pages] < done  # not in this load already
        held = np.cumsum(fresh)
        last = int(np.searchsorted(ends, done + np.searchsorted(held, buffer_pages, "right"), "right"))
        end = int(ends[last - 1])
        fresh = fresh[: end - done]
        index[done:end] = held[: end - done] - 1
        for again in done + np.flatnonzero(~fresh):
            index[again] = index[before[again]]
        loads.append((pages[done:end][fresh].tolist(), items[order[bounds[group] : bounds[last]]]))
        group, done = last, end

    found = np.zeros(is_page.shape, dtype=np.int64)
    found[is_page] = index
    is_page = places != _NONE
    table[entries[is_page]] = buffer_entry(found[np.cumsum(is_first) - 1][is_page])
    return loads


_NONE = -(2**62)  # in the place of a page; behind all locations


def _before(pages: np.ndarray) -> np.ndarray:
    """For each page where it was before, -1 for the first time."""
    order = np.argsort(pages, kind="stable")
    same = np.flatnonzero(np.diff(pages[order]) == 0)
    before = np.full(len(pages), -1)
    before[order[same + 1]] = order[same]
    return before
