"""Which states and which pages the ranks of a context group exchange in a step on CUDA, see `cuda_context.py`.

Dims: D ranks of the group, S tokens of a rank's page, D * S of the leader's: of such a one the c-th rank has the c-th
S tokens, in the same slot of its pools. Pages of S tokens, one after the other, are the splits of decode. Cold pages
are cold on all ranks alike, so all make the same loads and rounds, and what they give has the same size on each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np

from distkv.kernels.cuda.prefill import BLOCK_M
from distkv.kernels.page_entries import buffer_entry, buffer_index
from distkv.workers.attention.cuda import RoundArrays, round_arrays
from distkv.workers.attention.decode_plan import DecodePlan, DecodeRound
from distkv.workers.attention.prefill_plan import PrefillPlan, plan_prefill
from distkv.workers.attention.step_loads import Member, StepLoads
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import Array


@dataclass(frozen=True)
class ContextRoundArrays(Generic[Array]):
    """What decode reads in a round, see `ContextRound`."""

    own: RoundArrays[Array]
    sequences: Array
    given: Array
    found: Array


@dataclass(frozen=True)
class ContextRound:
    """A round of decode; all arrays int64."""

    own: DecodeRound  # with this rank's pages as items, and rows among those of few tokens
    sequences: np.ndarray  # those of `own` with rows of the step, for the merge
    given: np.ndarray  # states that this rank gives, as many as any other: the last ones may stand for nothing
    found: np.ndarray  # of each state of the round, where it is among all that are given, rank after rank

    @property
    def arrays(self) -> ContextRoundArrays[np.ndarray]:
        """What the kernels read."""
        return ContextRoundArrays(round_arrays(self.own), self.sequences, self.given, self.found)


@dataclass(frozen=True)
class ContextDecode:
    """Sequences with the same number of new tokens."""

    num_tokens: int
    table: np.ndarray  # of pages of S tokens; what is said of other ranks' is not read
    rounds: list[ContextRound]


@dataclass(frozen=True)
class PiecePages(Generic[Array]):
    """The pages of the leader that ranks exchange at a time, in logical order among those of a kind; int64. All of the
    first rank lie before those of the next one, in a pool or in a buffer."""

    slots: Array  # on the device
    indexes: Array  # in the buffer of the load


@dataclass(frozen=True)
class ContextPrefill:
    """Chunks of prompts. A piece is of one sequence."""

    plan: PrefillPlan  # whose loads are pieces
    pieces: list[PiecePages[np.ndarray]]
    loads: list[int]  # by piece, -1 where all before and in it is on the device
    filled: np.ndarray  # with a codec: slots of this rank's pages that the chunks fill
    most_filled: int  # of a rank


def grid_of_ranks(brought: StepLoads, members: Sequence[Member], page_size: int, size: int) -> StepLoads:
    """The loads of the leader's pages, by pages of S tokens."""
    keys = np.array([step.start + len(step.token_ids) for _, step in members], dtype=np.int64)
    num_pages = -(-keys // page_size)
    firsts = np.cumsum(num_pages) - num_pages
    owner = np.repeat(np.arange(len(members)), num_pages)
    whole = (np.arange(len(owner)) - firsts[owner]) // size  # the leader's page, of its sequence
    entry, cell = brought.first_entry[owner] + whole, brought.first_cell[owner] + whole // brought.cell_pages
    return replace(
        brought, table=brought.table[entry], is_cold=brought.is_cold[entry], num_pages=num_pages, first_entry=firsts,
        load_of_cell=brought.load_of_cell[cell], first_cell=firsts, cell_pages=1,
    )  # fmt: skip


def plan_context_decode(plan: DecodePlan, few_rows: np.ndarray, rank: int, size: int) -> ContextDecode:
    """What a rank does of a plan on the grid of ranks.

    Args:
        few_rows: rows of the step of all that decode, ascending.
    """
    return ContextDecode(plan.num_tokens, plan.table, [_round(one, few_rows, rank, size) for one in plan.rounds])


def _round(one: DecodeRound, few_rows: np.ndarray, rank: int, size: int) -> ContextRound:
    owner = one.items[:, 1] % size
    state = one.sequences[one.items[:, 0], 3] + one.items[:, 1]
    order = np.argsort(state)
    owner_of_state = owner[order]
    given = [np.flatnonzero(owner_of_state == member) for member in range(size)]
    most = max(map(len, given))
    found = np.zeros(one.num_states, dtype=np.int64)
    for member, states in enumerate(given):
        found[states] = member * most + np.arange(len(states))
    mine = owner == rank
    ends = np.cumsum(one.num_items)
    num_items = [int(part.sum()) for part in np.split(mine, ends[:-1])]
    few = one.sequences.copy()
    few[:, 0] = np.searchsorted(few_rows, few[:, 0])  # padding has no items
    padded = np.pad(given[rank], (0, most - len(given[rank])))
    own = replace(one, sequences=few, items=one.items[mine], num_items=num_items)
    return ContextRound(own, one.sequences, padded, found)


def plan_context_prefill(
    members: list[Member], first: int, whole: StepLoads, grid: StepLoads, page_size: int, rank: int, size: int,
    group_size: int, piece_pages: int, has_codec: bool,
) -> ContextPrefill:  # fmt: skip
    """Plans the chunks of a step.

    Args:
        first: index of the first of them among the sequences of `whole`, of which they are the last.
        whole: by the leader's pages; `grid` is the same by those of ranks.
        group_size: query heads of this rank per KV head.
        piece_pages: of the leader, that are exchanged at a time at most.
    """
    cut: list[tuple[int, int, int, int]] = sorted(
        (load, number, begin, min(begin + piece_pages, end))
        for number in range(first, first + len(members))
        for start, end, load in _segments(whole, number)
        for begin in range(start, end, piece_pages)
    )
    table, piece_of = grid.table.copy(), grid.load_of_cell.copy()
    pieces = []
    for piece, (_, number, begin, end) in enumerate(cut):
        entries = whole.table[whole.first_entry[number] + np.arange(begin, end)]
        on_device = entries >= 0
        pieces.append(PiecePages(entries[on_device], buffer_index(entries[~on_device])))
        place = np.where(on_device, np.cumsum(on_device), np.cumsum(~on_device)) - 1
        page = np.arange(begin * size, min(end * size, int(grid.num_pages[number])))
        at, member = page // size - begin, page % size
        here = grid.first_entry[number] + page
        on_device, place = on_device[at], place[at]
        num_warm, num_cold = len(pieces[-1].slots), len(pieces[-1].indexes)
        table[here] = np.where(on_device, member * num_warm + place, buffer_entry(member * num_cold + place))
        piece_of[here] = piece
    of_ranks = [(row, replace(step, pages=_slots(step, page_size, size))) for row, step in members]
    met = replace(grid, table=table, load_of_cell=piece_of)
    plan = plan_prefill(of_ranks, first, met, page_size, group_size, BLOCK_M, has_codec)
    loads = [load for load, *_ in cut]
    if not has_codec:
        return ContextPrefill(plan, pieces, loads, plan.filled, 0)
    pages = [
        np.arange(one.start // page_size, (one.start + len(one.token_ids)) // page_size) % size for _, one in members
    ]
    owner = np.concatenate(pages)  # of each page that is filled
    counts = np.bincount(owner, minlength=size)
    index = np.zeros_like(owner)
    for one in range(size):
        index[owner == one] = np.arange(counts[one])
    most = int(counts.max())
    own = plan.chunks[:, 7]
    plan.chunks[:, 7] = np.where(own < 0, -1, np.append(owner * most + index, -1)[own])
    return ContextPrefill(plan, pieces, loads, plan.filled[owner == rank], most)


def _slots(step: SequenceStep, page_size: int, size: int) -> np.ndarray:
    """Where each page of S tokens lies on the rank that has it."""
    pages = np.arange(-(-(step.start + len(step.token_ids)) // page_size))
    slots: np.ndarray = step.pages[pages // size]
    return slots


def _segments(whole: StepLoads, number: int) -> list[tuple[int, int, int]]:
    """Of a sequence `(first page, end, load)`, by the leader's pages, -1 before the first load."""
    num_pages, first = int(whole.num_pages[number]), whole.first_cell[number]
    loads = whole.load_of_cell[first : first + -(-num_pages // whole.cell_pages)]
    reached = np.maximum.accumulate(loads)  # pages on the device are met with the load before them
    begins = np.flatnonzero(np.diff(reached, prepend=-2))
    ends = [*(begins[1:] * whole.cell_pages).tolist(), num_pages]
    return list(zip((begins * whole.cell_pages).tolist(), ends, reached[begins].tolist(), strict=True))
