"""Attention of a step by the native kernels of a CPU, which find pages by a table.

In which order sequences meet their pages, `page_walk.py` says.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import Library
from distkv.kernels.native.paged_attention import Chunks, CodedPages, attend_pages, kept_states
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.workers.attention.page_walk import PageWalk, Pieces, cut_pieces, walk_pages
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
        coded = coded_pages(self.codec, self.filled, layer_pool)
        for index, chunks in enumerate(self.calls):
            buffer = None
            if index < len(self.loads):
                assert stream is not None
                buffer = stream.take()
            attend_pages(self.library, q, layer_pool, buffer, self.table, chunks, kept, out, coded)
        return out


def plan_native_attention(
    library: Library, steps: list[SequenceStep], page_size: int, buffer_pages: int, codec: NativeCodec | None = None
) -> NativeAttention:
    """The attention of a step for a rank with `buffer_pages` pages in a buffer of its staging ring."""
    pieces = cut_pieces(steps, None if codec is None else page_size)
    walk = walk_pages(steps, pieces, page_size, buffer_pages)
    filled, exact = rounding(walk, pieces, page_size, codec)
    calls = [chunks_of(walk, pieces, exact, *stretch) for stretch in walk.stretches]
    return NativeAttention(library, torch.from_numpy(walk.table), walk.loads, calls, codec, torch.from_numpy(filled))


def coded_pages(codec: NativeCodec | None, filled: Tensor | None, layer_pool: Tensor) -> CodedPages | None:
    """With a codec, gives the pages in slots that a step fills the values of their codes; returns what they held."""
    if codec is None:
        return None
    assert filled is not None
    coded = CodedPages(codec.format, layer_pool.new_empty(len(filled), *layer_pool[:, 0].shape))
    codec.round(layer_pool, filled, coded.exact)
    return coded


def rounding(
    walk: PageWalk, pieces: Pieces, page_size: int, codec: NativeCodec | None
) -> tuple[np.ndarray, np.ndarray]:
    """The slots of pages that a step fills, and of each piece which of them its own page is, -1 for none and without a
    codec."""
    own_page = pieces.start // page_size
    is_filled = (own_page + 1) * page_size <= pieces.end
    filled = walk.table[walk.firsts[pieces.sequence] + own_page][is_filled]
    exact = np.where(is_filled, np.cumsum(is_filled) - 1, -1) if codec is not None else np.full(len(own_page), -1)
    return filled, exact


def chunks_of(
    walk: PageWalk, pieces: Pieces, exact: np.ndarray, begins: np.ndarray, ends: np.ndarray,
    wanted: np.ndarray | None = None,
) -> Chunks:  # fmt: skip
    """The pieces, or those that are wanted, over the pages from `begins` to `ends` of each."""
    few, meets = pieces.count <= MAX_DECODE_TOKENS, ends > begins
    in_order = np.argsort(~few, kind="stable")
    chosen = in_order[(meets if wanted is None else meets & wanted)[in_order]]
    firsts = walk.firsts[pieces.sequence]
    columns = [pieces.row, pieces.count, pieces.start, firsts, begins, ends, ends == walk.met, exact]
    return Chunks(torch.from_numpy(np.stack(columns, axis=1)[chosen]), int(few[chosen].sum()))
