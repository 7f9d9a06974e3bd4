"""Attention over chosen pages, and how much of the weight of all pages these have.

Dims: C choices, each of the query heads of one KV head of one token, or of some of one page; T tokens of all choices;
G query heads to each, S page_size, D head_dim.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.library import Library
from distkv.kernels.native.page_weights import page_weights
from distkv.kernels.native.paged_attention import WANTED, CodedPages, attend_pages, kept_states
from distkv.workers.attention.chosen_pages import ChosenCalls

Bring = Callable[[np.ndarray, np.ndarray], Tensor]
"""`SlicesOnDemand.bring` in a layer."""


def attend_chosen(
    library: Library, calls: ChosenCalls, q: Tensor, pool: Tensor, bring: Bring, coded: CodedPages | None,
    page_states: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The attention `[T, G * D]` of queries `[T, G, D]`; see `ChosenCalls` for what `pool` is to look like, and
    `attend_pages` for `page_states`."""
    out = q.new_empty(len(q), q.shape[1] * q.shape[2])
    kept = kept_states(*q.shape) if len(calls.calls) > 1 else None
    for index, chunks in enumerate(calls.calls):
        buffer = bring(*calls.loads[index]) if calls.loads else None
        attend_pages(library, q, pool, buffer, calls.table, chunks, kept, out, coded, page_states)
    return out


def attend_and_weigh(
    library: Library, calls: ChosenCalls, q: Tensor, pool: Tensor, bring: Bring, coded: CodedPages | None
) -> tuple[Tensor, list[np.ndarray]]:
    """The same, and by choice the weights of its pages, fp64 `[pages, tokens]`, see `page_weights`."""
    group = q.shape[1]
    states = torch.zeros(len(calls.table), 1, calls.most_tokens * group, 2)
    out = attend_chosen(library, calls, q, pool, bring, coded, states)
    weights = page_weights(library, states, calls.counts, group)
    return out, np.split(weights, np.cumsum(calls.counts)[:-1])


def total_weights(
    library: Library, calls: ChosenCalls, q: Tensor, pool: Tensor, bring: Bring, coded: CodedPages | None
) -> Tensor:
    """The sums of the weights that each query gives to keys, as float64 logarithms to the base 2: `[T, G]`."""
    kept = kept_states(*q.shape)
    nothing = q.new_empty(0)
    for index, chunks in enumerate(calls.calls):
        buffer = bring(*calls.loads[index]) if calls.loads else None
        numbers = chunks.numbers.clone()
        numbers[:, WANTED] = 0  # so that states are kept
        wanted = replace(chunks, numbers=numbers)
        attend_pages(library, q, pool, buffer, calls.table, wanted, kept, nothing, coded)
    highest, sums = kept[..., -2].double(), kept[..., -1].double()
    return highest + torch.log2(sums)


def covered(chosen: Tensor, everything: Tensor) -> Tensor:
    """Which part of all weight the chosen pages have, by what `total_weights` gives for both; without those of requests
    that end since their numbers are not finite."""
    parts = torch.exp2(chosen - everything)
    return parts[parts.isfinite()]
