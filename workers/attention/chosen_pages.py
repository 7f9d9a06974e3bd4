"""From the pages that tokens have chosen to what a kernel is told: a table, loads, and a call for each."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.paged_attention import Chunks
from distkv.kernels.page_entries import buffer_entry


@dataclass(frozen=True)
class ChosenPages:
    """What the query heads of each KV head of each token, or of some tokens of a page together, have chosen, one such
    choice after the other.

    All arrays are int64. Dims: C choices, N pages of all of them.
    """

    locations: np.ndarray  # [N], see `encode_location`
    indexes: np.ndarray  # [N], of the page in its sequence, rising within a choice
    counts: np.ndarray  # [C]
    heads: np.ndarray  # [C], the KV head
    num_tokens: np.ndarray  # [C], that share the choice: one, or some of one page
    offsets: np.ndarray  # [C], of the first token in its page, which is the last one of its choice
    exact: np.ndarray  # [C], where that page lies in `CodedPages.exact`, -1 where it is read from the table

    @property
    def owners(self) -> np.ndarray:
        """The choice of each page, [N]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


@dataclass(frozen=True)
class ChosenCalls:
    """A call of the kernel for each load, and one where there is none.

    The kernel is to see the pool as `[2, slots * K, 1, S, D]`, a buffer of slices as `[slices, 2, 1, S, D]`, and the
    tokens of each choice, one after the other, as tokens with the query heads of one KV head.
    """

    table: Tensor  # int64 [N]
    counts: np.ndarray  # int64 [C], of pages
    most_tokens: int  # of a choice
    loads: list[tuple[np.ndarray, np.ndarray]]  # locations and KV heads, as `SlicesOnDemand.bring` takes them
    calls: list[Chunks]


def plan_chosen(chosen: ChosenPages, page_size: int, num_kv_heads: int, capacity: int) -> ChosenCalls:
    """Shares the cold pages out among loads of at most `capacity` slices. They are brought by their place in the
    sequence, each once for all that have chosen it, and between two loads each choice goes on to its next cold page."""
    counts, owners = chosen.counts, chosen.owners
    firsts = np.cumsum(counts) - counts
    heads = chosen.heads[owners]
    table = chosen.locations * num_kv_heads + heads
    cold = np.flatnonzero(chosen.locations < 0)
    loads: list[tuple[np.ndarray, np.ndarray]] = []
    # by load, the first page of each choice that is in that load or a later one, counted in the choice
    next_cold = counts[None]
    if len(cold):
        # for -1 and the heads 0, 1, 2 of three: -3, -2, -1
        slices, at, number = np.unique(table[cold], return_index=True, return_inverse=True)
        capacity = max(1, capacity)
        in_order = np.lexsort((slices, chosen.indexes[cold][at]))
        brought = cold[at[in_order]]
        rank = np.empty_like(in_order)
        rank[in_order] = np.arange(len(in_order))
        table[cold] = buffer_entry(rank[number] % capacity)
        parts = (brought[first : first + capacity] for first in range(0, len(brought), capacity))
        loads = [(chosen.locations[part], heads[part]) for part in parts]
        next_cold = np.tile(counts, (len(loads) + 1, 1))
        places = np.arange(len(table)) - firsts[owners]
        np.minimum.at(next_cold, (rank[number] // capacity, owners[cold]), places[cold])
        next_cold = np.minimum.accumulate(next_cold[::-1])[::-1]
    starts = (counts - 1) * page_size + chosen.offsets
    tokens = chosen.num_tokens
    rows = np.cumsum(tokens) - tokens
    calls, begins = [], np.zeros_like(counts)
    for load in range(max(1, len(loads))):
        ends = next_cold[min(load + 1, len(loads))]
        columns = [rows, tokens, starts, firsts, begins, ends, ends == counts, chosen.exact]
        numbers = np.stack(columns, axis=1)[ends > begins].astype(np.int64)
        calls.append(Chunks(torch.from_numpy(numbers), len(numbers)))
        begins = ends
    return ChosenCalls(torch.from_numpy(table), counts, int(tokens.max(initial=0)), loads, calls)
