"""How the new tokens of a step meet their pages on a CPU: in logical order, and cold pages as loads bring them.

Cold pages are brought in logical order, each once however many sequences share it (a shared page has one place in all
of them), and between two loads a sequence goes on to its next cold page.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distkv.kernels.page_entries import buffer_entry
from distkv.storage.moving.staging_ring import Load
from distkv.storage.paging import pages_for
from distkv.workers.page_directory import SequenceStep


@dataclass(frozen=True)
class Pieces:
    """New tokens that meet the same pages, all int64 `[pieces]`: those of a sequence, or, with a codec, of a page."""

    sequence: np.ndarray
    row: np.ndarray  # of the step, the first
    count: np.ndarray
    start: np.ndarray  # position of the first
    end: np.ndarray  # of the sequence, behind its last token


@dataclass(frozen=True)
class PageWalk:
    """Which pages the pieces of a step meet, and when."""

    table: np.ndarray  # int64: where each page of each sequence lies, in the pool or in its load, see `page_entries.py`
    firsts: np.ndarray  # int64: the first entry of each sequence
    num_pages: np.ndarray  # int64, of each sequence
    loads: list[Load]
    # by load, once where there is none: of each piece the first page, and the end, of those that it meets then
    stretches: list[tuple[np.ndarray, np.ndarray]]
    met: np.ndarray  # int64, pages that each piece meets in all


def cut_pieces(steps: list[SequenceStep], page_size: int | None) -> Pieces:
    """The new tokens of all sequences, cut at the borders of pages if their size is given."""
    cut = []
    row = 0
    for number, step in enumerate(steps):
        end = step.start + len(step.token_ids)
        starts = [step.start]
        if page_size is not None:
            starts += range((step.start // page_size + 1) * page_size, end, page_size)
        cut += [
            (number, row + start - step.start, until - start, start, end) for start, until in pairwise([*starts, end])
        ]
        row += len(step.token_ids)
    return Pieces(*np.array(cut, dtype=np.int64).T)


def walk_pages(steps: list[SequenceStep], pieces: Pieces, page_size: int, buffer_pages: int) -> PageWalk:
    """The walk of a step's pieces over pages of so many tokens, with so many pages in a buffer of the staging ring."""
    num_pages = np.array([pages_for(step.start + len(step.token_ids), page_size) for step in steps], dtype=np.int64)
    firsts = np.cumsum(num_pages) - num_pages
    table = np.concatenate([step.pages[:count] for step, count in zip(steps, num_pages, strict=True)])
    owner = np.repeat(np.arange(len(steps)), num_pages)
    logical = np.arange(len(table)) - firsts[owner]

    cold = np.flatnonzero(table < 0)
    loads, load_of_entry, index_in_load = _loads(table[cold], logical[cold], buffer_pages)
    table[cold] = buffer_entry(index_in_load)
    # by load, the first cold page of each sequence in that load or a later one
    next_cold = np.tile(num_pages, (len(loads) + 1, 1))
    np.minimum.at(next_cold, (load_of_entry, owner[cold]), logical[cold])
    next_cold = np.minimum.accumulate(next_cold[::-1])[::-1]
    met = (pieces.start + pieces.count + page_size - 1) // page_size
    begins = np.zeros_like(met)
    stretches = []
    for number in range(max(1, len(loads))):
        # each goes on to its first page of a later load
        ends = np.minimum(next_cold[min(number + 1, len(loads))][pieces.sequence], met)
        stretches.append((begins, ends))
        begins = ends
    return PageWalk(table, firsts, num_pages, loads, stretches, met)


def spread(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of ranges one after the other, of each range `counts` of them from `firsts` on: of each number, which
    range it is in, and itself."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - (np.cumsum(counts) - counts)[which] + firsts[which]


def _loads(locations: np.ndarray, logical: np.ndarray, buffer_pages: int) -> tuple[list[Load], np.ndarray, np.ndarray]:
    """The loads of cold pages; and of each of the given entries, which load it is in and where it lies there."""
    if not len(locations):
        return [], locations, locations
    distinct, at, number = np.unique(locations, return_index=True, return_inverse=True)
    load = np.empty_like(number, shape=len(distinct))
    load[np.lexsort((-distinct, logical[at]))] = np.arange(len(distinct)) // buffer_pages
    # within a load by tier and slot (a higher one has a lower location), so that neighbours are brought together
    in_order = np.lexsort((-distinct, load))
    place = np.empty_like(load)
    place[in_order] = np.arange(len(distinct)) % buffer_pages  # all loads but the last are full
    brought = distinct[in_order]
    loads: list[Load] = [
        brought[first : first + buffer_pages].tolist() for first in range(0, len(brought), buffer_pages)
    ]
    return loads, load[number], place[number]
