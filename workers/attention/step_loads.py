"""Which loads bring the cold pages of a step to the kernels of CUDA, and where each of its sequences finds them: as
plain arrays.

Kernels meet pages in cells of a fixed grid, and the cold pages of a cell are brought by one load, since a kernel reads
a cell in one launch. Loads go through cells in order, those of all sequences that begin with the same cold page
together: so a page that sequences share is brought once for all of them, those that decode and those whose prompts are
read, however much else they have.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from distkv.kernels.page_entries import buffer_entry
from distkv.storage.moving.staging_ring import Load
from distkv.workers.page_directory import SequenceStep

Member = tuple[int, SequenceStep]
"""A sequence and its first row of the step."""


@dataclass(frozen=True)
class StepLoads:
    """The pages of some sequences, one sequence after the other, and the loads that bring the cold ones."""

    table: np.ndarray  # where each page lies: a device slot, or the `buffer_entry` of its load
    is_cold: np.ndarray  # of each page
    num_pages: np.ndarray  # by sequence
    first_entry: np.ndarray  # of the table, by sequence
    batches: np.ndarray  # by sequence: loads are for those of batch 0 first, and so on
    loads: list[Load]
    load_of_cell: np.ndarray  # the load of each cell, one sequence after the other; -1 where no page of it is cold
    first_cell: np.ndarray  # by sequence
    cell_pages: int


def plan_loads(
    members: list[Member], most_together: list[tuple[int, int]], page_size: int, cell_pages: int, buffer_pages: int
) -> StepLoads:
    """Plans the loads of a step.

    Args:
        most_together: a kind by sequence, and how many of this kind may be in one batch.
        buffer_pages: pages of a buffer of the staging ring, a cell's at least.
    """
    num_keys = np.array([step.start + len(step.token_ids) for _, step in members], dtype=np.int64)
    num_pages = -(-num_keys // page_size)
    table = np.concatenate([step.pages[:count] for (_, step), count in zip(members, num_pages, strict=True)])
    first_entry = np.cumsum(num_pages) - num_pages
    num_cells = -(-num_pages // cell_pages)
    first_cell = np.cumsum(num_cells) - num_cells
    load_of_cell = np.full(num_cells.sum(), -1)
    is_cold = table < 0

    cold = np.flatnonzero(is_cold)
    owner = np.repeat(np.arange(len(members)), num_pages)[cold]
    is_first = np.diff(owner, prepend=-1) != 0
    batches = _batches(dict(zip(owner[is_first].tolist(), table[cold[is_first]].tolist(), strict=True)), most_together)
    cell = (cold - first_entry[owner]) // cell_pages
    starts = np.flatnonzero(np.diff(first_cell[owner] + cell, prepend=-1))  # of each cell that has cold pages
    item = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(cold)))
    column = np.arange(len(cold)) - starts[item]
    places = np.full((len(starts), cell_pages), _NONE)
    places[item, column] = table[cold]
    order = np.lexsort([*(-places).T[::-1], cell[starts], batches[owner[starts]]])
    loads, load, index = _fill_buffers(places[order], buffer_pages)
    at = np.empty_like(order)
    at[order] = np.arange(len(order))
    table[cold] = buffer_entry(index[at[item], column])
    load_of_cell[(first_cell[owner] + cell)[starts]] = load[at]
    return StepLoads(table, is_cold, num_pages, first_entry, batches, loads, load_of_cell, first_cell, cell_pages)


_NONE = -(2**62)  # in the place of a page; behind all locations


def _batches(first_cold: dict[int, int], most_together: list[tuple[int, int]]) -> np.ndarray:
    """The batch of each sequence: those that begin with the same cold page are in one, as far as they may be."""
    numbers: dict[tuple[int, int, int], int] = {}
    num_before: Counter[tuple[int, int, int]] = Counter()
    found = []
    for member, (kind, most) in enumerate(most_together):
        family = member in first_cold, first_cold.get(member, member)
        before = num_before[*family, kind]
        num_before[*family, kind] += 1
        found.append(numbers.setdefault((*family, before // most), len(numbers)))
    return np.array(found)


def _fill_buffers(places: np.ndarray, buffer_pages: int) -> tuple[list[Load], np.ndarray, np.ndarray]:
    """Loads for rows of cold locations, in order, those of a row by one of them; also by row its load, and `[rows, P]`
    where each location lies in that.

    A context of a million tokens has thousands of pages, and nothing here is done page by page but for those that
    several rows have, each beside others.
    """
    loads: list[Load] = []
    load_of, index_of = np.zeros(len(places), dtype=np.int64), np.zeros(places.shape, dtype=np.int64)
    if not len(places):
        return loads, load_of, index_of
    is_first = np.ones(len(places), dtype=bool)
    is_first[1:] = (places[1:] != places[:-1]).any(axis=1)
    groups = np.flatnonzero(is_first)  # rows of equal pages are served together
    pages, is_page = places[groups], places[groups] != _NONE
    ends = np.cumsum(is_page.sum(axis=1))
    pages = pages[is_page]

    before = _before(pages)
    index = np.zeros(len(pages), dtype=np.int64)  # in the buffer of its load
    load_of_group = np.zeros(len(groups), dtype=np.int64)
    group = done = 0
    while group < len(groups):
        fresh = before[done : done + buffer_pages * places.shape[1]] < done  # not in this load already
        held = np.cumsum(fresh)
        last = int(np.searchsorted(ends, done + np.searchsorted(held, buffer_pages, "right"), "right"))
        end = int(ends[last - 1])
        fresh = fresh[: end - done]
        brought = pages[done:end][fresh]
        order = np.argsort(-brought)  # by tier and slot, so that neighbours are brought together
        index[done + np.flatnonzero(fresh)[order]] = np.arange(len(brought))
        for again in done + np.flatnonzero(~fresh):
            index[again] = index[before[again]]
        load_of_group[group:last] = len(loads)
        loads.append(brought[order].tolist())
        group, done = last, end

    of_group = np.zeros(is_page.shape, dtype=np.int64)
    of_group[is_page] = index
    group_of = np.cumsum(is_first) - 1
    return loads, load_of_group[group_of], of_group[group_of]


def _before(pages: np.ndarray) -> np.ndarray:
    """For each page where it was before, -1 for the first time."""
    order = np.argsort(pages, kind="stable")
    same = np.flatnonzero(np.diff(pages[order]) == 0)
    before = np.full(len(pages), -1)
    before[order[same + 1]] = order[same]
    return before
