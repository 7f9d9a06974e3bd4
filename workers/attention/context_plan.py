"""Which states and which pages the ranks of a context group exchange in a step, see `context_attention.py`.

Dims: D ranks of the group, S tokens of a rank's page, D * S of the leader's: of such a one the c-th rank has the c-th
S tokens, in the same slot of its pools. Pages of S tokens are what tokens attend to, one after the other. All ranks
plan alike, so that what they give has the same size on each.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.paged_attention import Chunks
from distkv.kernels.page_entries import buffer_entry, buffer_index
from distkv.storage.moving.staging_ring import Load
from distkv.workers.attention.page_walk import PageWalk, Pieces, cut_pieces, spread, walk_pages
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS


@dataclass(frozen=True)
class Limits:
    """What ranks exchange at a time at most, or little more."""

    states: int  # rows of states that one gives
    pages: int  # that one gives


@dataclass(frozen=True)
class StateRound:
    """States of pages that few tokens meet: each rank gives those of its own pages for all query heads of the group,
    and gets those of its own query heads.

    Rows of states are numbered: first those that are carried on, one for each row of few tokens, then `num_rows` of
    each rank.
    """

    items: Tensor  # int64 [N, 7]: this rank's pages, see `page_states`; rows of queries are those of few tokens
    num_rows: int  # of states that each rank gives
    order: Tensor  # as `merge_page_states` takes them, and where the results go
    offsets: Tensor
    targets: Tensor


@dataclass(frozen=True)
class PageRound:
    """Pages that many tokens meet: each rank gives its own, and attends by its own query heads. Those on the device
    make a pool, page after page of the first rank, then of the next one, and cold ones a buffer likewise."""

    slots: Tensor  # int64: on the device
    indexes: Tensor  # int64: in the buffer of the load
    chunks: Chunks


@dataclass(frozen=True)
class ContextPlan:
    """The attention of a step."""

    loads: list[Load]
    rounds: list[tuple[list[StateRound], list[PageRound]]]  # by load; once where there is none
    few_rows: Tensor  # int64: rows of the step of few tokens
    table: Tensor  # int64: entries of pages that many tokens meet
    filled: Tensor  # int64: slots of this rank's pages that the step fills
    most_filled: int  # of a rank

    @property
    def num_page_rounds(self) -> int:
        return sum(len(pages) for _, pages in self.rounds)


def plan_context(
    steps: list[SequenceStep], page_size: int, rank: int, size: int, buffer_pages: int, limits: Limits, coded: bool
) -> ContextPlan:
    """The plan of a rank of a context group.

    Args:
        page_size: tokens of a rank's page.
        rank: its place among the `size` ranks of the group.
        buffer_pages: pages in a buffer of its staging ring.
        coded: whether full pages have a codec: tokens meet the page that they fill as it was before it is rounded.
    """
    pieces = cut_pieces(steps, page_size if coded else None)
    walk = walk_pages(steps, pieces, page_size * size, buffer_pages)
    planner = _Planner(pieces, walk, page_size, rank, size, limits, coded)
    rounds = [(planner.states(*stretch), planner.pages(*stretch)) for stretch in walk.stretches]
    return ContextPlan(
        walk.loads, rounds, torch.from_numpy(planner.few_rows), torch.from_numpy(planner.table),
        torch.from_numpy(planner.filled), planner.most_filled,
    )  # fmt: skip


class _Planner:
    def __init__(
        self, pieces: Pieces, walk: PageWalk, page_size: int, rank: int, size: int, limits: Limits, coded: bool
    ):
        self.pieces, self.walk, self.page_size = pieces, walk, page_size
        self.rank, self.size, self.limits = rank, size, limits
        self.few = pieces.count <= MAX_DECODE_TOKENS
        self.met = -(-(pieces.start + pieces.count) // page_size)  # pages of a rank that a piece meets, of all ranks
        self.firsts = walk.firsts[pieces.sequence]
        few_counts = np.where(self.few, pieces.count, 0)
        self.few_row = np.cumsum(few_counts) - few_counts  # of each piece, the first among the rows of few tokens
        self.few_rows = spread(pieces.row, few_counts)[1]
        self.table = np.zeros(len(walk.table) * size, dtype=np.int64)
        # the page of a piece's own tokens, which has a place among those of its rank that are filled
        self.own = pieces.start // page_size
        is_filled = ((self.own + 1) * page_size <= pieces.end) & coded
        owner, self.exact = self.own % size, np.full(len(self.own), -1)
        counts = [0]
        for one in range(size):
            chosen = is_filled & (owner == one)
            counts.append(int(chosen.sum()))
            self.exact[chosen] = np.arange(counts[-1])
        self.most_filled, self.owner = max(counts), owner
        mine = is_filled & (owner == rank)
        self.filled = walk.table[self.firsts[mine] + self.own[mine] // size]

    def states(self, begins: np.ndarray, ends: np.ndarray) -> list[StateRound]:
        """The rounds of few tokens in a stretch of the walk."""
        piece, page = spread(begins, np.where(self.few, ends - begins, 0))
        if not len(piece):
            return []
        rows = self.pieces.count[piece]
        number = (np.cumsum(rows) - 1) // self.limits.states
        cuts = np.flatnonzero(np.diff(number)) + 1
        return [self._state_round(*both) for both in zip(np.split(piece, cuts), np.split(page, cuts), strict=True)]

    def _state_round(self, piece: np.ndarray, page: np.ndarray) -> StateRound:
        """Of pages of the leader, by piece and in logical order."""
        pieces, size = self.pieces, self.size
        rows = pieces.count[piece]
        first = np.cumsum(rows) - rows  # among the states that a rank gives
        num_rows, num_kept = int(rows.sum()), len(self.few_rows)
        own = page * size + self.rank
        columns = [
            self.few_row[piece], rows, pieces.start[piece], own, self.walk.table[self.firsts[piece] + page],
            np.where(own == self.own[piece], self.exact[piece], -1), first,
        ]  # fmt: skip
        items = np.stack(columns, axis=1)[own < self.met[piece]]

        which, index = spread(np.zeros_like(rows), rows)
        row, position = self.few_row[piece][which] + index, pieces.start[piece][which] + index
        member = np.arange(size)
        met = page[which][:, None] * size + member
        state = num_kept + member * num_rows + (first[which] + index)[:, None]
        sees = met * self.page_size <= position[:, None]
        row_of, met, state = np.broadcast_to(row[:, None], met.shape)[sees], met[sees], state[sees]
        # rows that have met pages before go on with what is carried
        is_first = np.r_[True, piece[1:] != piece[:-1]] & (page > 0)
        carried = row[is_first[which]]
        row_of, met = np.r_[carried, row_of], np.r_[np.full(len(carried), -1), met]
        state = np.r_[carried, state]
        order = np.lexsort((met, row_of))
        merged, counts = np.unique(row_of, return_counts=True)
        is_last = np.r_[piece[1:] != piece[:-1], True]
        goes_on = is_last & (page + 1 < self.walk.met[piece])
        kept = np.isin(merged, row[goes_on[which]])
        targets = np.where(kept, -1 - merged, self.few_rows[merged])
        return StateRound(
            torch.from_numpy(items), num_rows, torch.from_numpy(state[order]),
            torch.from_numpy(np.r_[0, np.cumsum(counts)]), torch.from_numpy(targets),
        )  # fmt: skip

    def pages(self, begins: np.ndarray, ends: np.ndarray) -> list[PageRound]:
        """The rounds of many tokens in a stretch of the walk."""
        pieces, walk, size = self.pieces, self.walk, self.size
        chosen = np.flatnonzero(~self.few & (ends > begins))
        if not len(chosen):
            return []
        first = np.full(len(walk.firsts), np.iinfo(np.int64).max)
        last = np.zeros_like(first)
        np.minimum.at(first, pieces.sequence[chosen], begins[chosen])
        np.maximum.at(last, pieces.sequence[chosen], ends[chosen])
        sequence, page = spread(first, np.maximum(last - first, 0))
        entry = walk.table[walk.firsts[sequence] + page]
        # each once, in logical order
        pairs, index = np.unique(np.stack([page, entry], axis=1), axis=0, return_inverse=True)
        index = index.reshape(-1)  # which numpy 2.0 does not do
        rounds = []
        for start in range(0, len(pairs), self.limits.pages):
            given = pairs[start : start + self.limits.pages, 1]
            on_device = given >= 0
            slots, indexes = given[on_device], buffer_index(given[~on_device])
            here = (index >= start) & (index < start + len(given))
            # of each page given, its place among those of its kind
            place = np.where(on_device, np.cumsum(on_device), np.cumsum(~on_device)) - 1
            place, is_cold = place[index[here] - start][:, None], ~on_device[index[here] - start][:, None]
            member = np.arange(size)
            entries = np.where(is_cold, buffer_entry(member * len(indexes) + place), member * len(slots) + place)
            self.table[(walk.firsts[sequence[here]] + page[here])[:, None] * size + member] = entries
            chunks = self._chunks(chosen, begins, ends, sequence[here], page[here])
            rounds.append(PageRound(torch.from_numpy(slots), torch.from_numpy(indexes), chunks))
        return rounds

    def _chunks(
        self, chosen: np.ndarray, begins: np.ndarray, ends: np.ndarray, sequence: np.ndarray, page: np.ndarray
    ) -> Chunks:
        """The chosen pieces over the given pages of their sequences."""
        pieces, walk, size = self.pieces, self.walk, self.size
        first, last = walk.num_pages.copy(), np.zeros_like(walk.num_pages)
        np.minimum.at(first, sequence, page)
        np.maximum.at(last, sequence, page + 1)
        of = pieces.sequence[chosen]
        begin, end = np.maximum(begins[chosen], first[of]), np.minimum(ends[chosen], last[of])
        chosen, begin, end = chosen[end > begin], begin[end > begin], end[end > begin]
        exact, met = self.exact[chosen], self.met[chosen]
        columns = [
            pieces.row[chosen], pieces.count[chosen], pieces.start[chosen], self.firsts[chosen] * size, begin * size,
            np.minimum(end * size, met), end == walk.met[chosen],
            np.where(exact < 0, -1, self.owner[chosen] * self.most_filled + exact),
        ]  # fmt: skip
        return Chunks(torch.from_numpy(np.stack(columns, axis=1).astype(np.int64)), 0)
