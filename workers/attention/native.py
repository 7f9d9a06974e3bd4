"""Attention of a step by the native kernels of a CPU, which find pages by a table.

Sequences meet their pages in logical order. Cold pages are brought in that order too, each once however many sequences
share it (a shared page has one place in all of them), and between two loads a sequence goes on to its next cold page.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import Library
from distkv.kernels.native.paged_attention import Chunks, CodedPages, attend_pages, kept_states
from distkv.kernels.page_entries import buffer_entry
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.paging import pages_for
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS


@dataclass(frozen=True)
class NativeAttention:
    """An `Attention`, see `batch.py`."""

    library: Library
    table: Tensor  # int64: where each page of each sequence lies, in the pool or in its load
    loads: list[Load]
    calls: list[Chunks]  # one for each load; one where there is none
    codec: NativeCodec | None = None  # of full pages
    filled: Tensor | None = None  # with a codec: int64, slots of the pages that the step fills

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`. Pages that the step fills get the values of their codes first; rows of their own tokens meet
        what they held before."""
        tokens, heads, dim = q.shape
        out = q.new_empty(tokens, heads * dim)
        kept = kept_states(tokens, heads, dim) if len(self.calls) > 1 else None
        coded = None
        if self.codec is not None:
            assert self.filled is not None
            coded = CodedPages(self.codec.format, layer_pool.new_empty(len(self.filled), *layer_pool[:, 0].shape))
            self.codec.round(layer_pool, self.filled, coded.exact)
        for index, chunks in enumerate(self.calls):
            buffer = None
            if index < len(self.loads):
                assert stream is not None
                buffer = stream.take()
            attend_pages(self.library, q, layer_pool, buffer, self.table, chunks, kept, out, coded)
        return out


@dataclass(frozen=True)
class Pieces:
    """New tokens that meet the same pages, all int64 `[pieces]`: those of a sequence, or, with a codec, of a page."""

    sequence: np.ndarray
    row: np.ndarray  # of the step, the first
    count: np.ndarray
    start: np.ndarray  # position of the first
    end: np.ndarray  # of the sequence, behind its last token


def plan_native_attention(
    library: Library, steps: list[SequenceStep], page_size: int, buffer_pages: int, codec: NativeCodec | None = None
) -> NativeAttention:
    """The attention of a step for a rank with `buffer_pages` pages in a buffer of its staging ring."""
    pieces = _pieces(steps, None if codec is None else page_size)
    num_pages = np.array([pages_for(step.start + len(step.token_ids), page_size) for step in steps], dtype=np.int64)
    firsts = np.cumsum(num_pages) - num_pages
    table = np.concatenate([step.pages[:count] for step, count in zip(steps, num_pages, strict=True)])
    owner = np.repeat(np.arange(len(steps)), num_pages)
    logical = np.arange(len(table)) - firsts[owner]

    own_page = pieces.start // page_size
    is_filled = (own_page + 1) * page_size <= pieces.end
    filled = table[firsts[pieces.sequence] + own_page][is_filled]
    exact = np.where(is_filled, np.cumsum(is_filled) - 1, -1) if codec is not None else np.full(len(own_page), -1)

    cold = np.flatnonzero(table < 0)
    loads, load_of_entry, index_in_load = _loads(table[cold], logical[cold], buffer_pages)
    table[cold] = buffer_entry(index_in_load)
    # by load, the first cold page of each sequence in that load or a later one
    next_cold = np.tile(num_pages, (len(loads) + 1, 1))
    np.minimum.at(next_cold, (load_of_entry, owner[cold]), logical[cold])
    next_cold = np.minimum.accumulate(next_cold[::-1])[::-1]
    few = pieces.count <= MAX_DECODE_TOKENS
    in_order = np.argsort(~few, kind="stable")
    met = (pieces.start + pieces.count + page_size - 1) // page_size  # pages of each
    begins = np.zeros_like(met)
    calls = []
    for number in range(max(1, len(loads))):
        # each goes on to its first page of a later load
        ends = np.minimum(next_cold[min(number + 1, len(loads))][pieces.sequence], met)
        columns = [pieces.row, pieces.count, pieces.start, firsts[pieces.sequence], begins, ends, ends == met, exact]
        chosen = in_order[(ends > begins)[in_order]]
        calls.append(Chunks(torch.from_numpy(np.stack(columns, axis=1)[chosen]), int(few[chosen].sum())))
        begins = ends
    return NativeAttention(library, torch.from_numpy(table), loads, calls, codec, torch.from_numpy(filled))


def _pieces(steps: list[SequenceStep], page_size: int | None) -> Pieces:
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
