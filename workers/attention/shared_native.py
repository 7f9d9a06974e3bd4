"""Attention of a step by the native kernels on a device that leaves a share of the pages to its host.

States of single pages are computed on both sides and merged in logical order, so that the bits are those of
`native.py`, whoever has which page. Prompts are the device's alone.
"""

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import Library
from distkv.kernels.native.page_states import merge_page_states, page_states, state_width
from distkv.kernels.native.paged_attention import Chunks, CodedPages, attend_pages, kept_states
from distkv.kernels.page_entries import buffer_entry
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.workers.attention.host_share import HostShare, host_slots, shared_pages
from distkv.workers.attention.native import chunks_of, coded_pages, rounding
from distkv.workers.attention.page_walk import PageWalk, Pieces, cut_pieces, spread, walk_pages
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS


@dataclass(frozen=True)
class Merge:
    """Which states make up the result of which rows; all int64, see `merge_page_states`."""

    rows: Tensor  # of the step
    order: Tensor
    offsets: Tensor
    num_states: int  # rows of states


@dataclass
class SharedAttention:
    """An `Attention`, see `batch.py`, of a step in which the host has pages."""

    library: Library
    host: HostShare
    walk: PageWalk
    calls: list[Chunks]  # by load, those that the device attends to as ever
    own: list[Tensor]  # by load, items of the device, see `page_states`
    left: Tensor  # items of the host
    merge: Merge
    codec: NativeCodec | None
    filled: Tensor  # see `NativeAttention`
    layer: int = 0  # of the next call
    states: Tensor | None = None  # of one layer after the other

    @property
    def loads(self) -> list[Load]:
        """See `Attention`."""
        return self.walk.loads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`."""
        tokens, heads, dim = q.shape
        if self.states is None:
            self.states = torch.empty(self.merge.num_states, heads, state_width(dim), dtype=torch.float32)
        coded = coded_pages(self.codec, self.filled, layer_pool)
        others = self._start_host(q, layer_pool, coded)
        self.layer += 1
        out = q.new_empty(tokens, heads * dim)
        kept = kept_states(tokens, heads, dim) if len(self.calls) > 1 else None
        table = torch.from_numpy(self.walk.table)
        try:
            for index, (chunks, items) in enumerate(zip(self.calls, self.own, strict=True)):
                buffer = None
                if index < len(self.loads):
                    assert stream is not None
                    buffer = stream.take()
                if len(chunks.numbers):
                    attend_pages(self.library, q, layer_pool, buffer, table, chunks, kept, out, coded)
                if len(items):
                    page_states(self.library, q, layer_pool, buffer, items, self.states, coded)
        finally:
            others.result()
        merge_page_states(self.library, self.states, self.merge.order, self.merge.offsets, out, self.merge.rows)
        return out

    def _start_host(self, q: Tensor, layer_pool: Tensor, coded: CodedPages | None) -> "Future[None]":
        assert self.states is not None
        pages = self.host.everything(self.layer)
        return self.host.submit(self.host.attend, self.layer, q, layer_pool, pages, self.left, self.states, coded)


def plan_shared_attention(
    library: Library, host: HostShare, steps: list[SequenceStep], page_size: int, buffer_pages: int,
    codec: NativeCodec | None = None,
) -> SharedAttention | None:  # fmt: skip
    """The attention of a step, as `plan_native_attention` plans it; None where the host has no page in it.

    A page that is the host's and has no copy there is met by the device: on the native kernels that is the same.
    """
    left = [shared_pages(step, page_size) for step in steps]
    for one, step in zip(left, steps, strict=True):
        one &= host_slots(step) >= 0
    if not any(one.any() for one in left):
        return None
    pieces = cut_pieces(steps, None if codec is None else page_size)
    # what the host has is no load
    met = [replace(step, pages=np.where(one, 0, step.pages)) for step, one in zip(steps, left, strict=True)]
    walk = walk_pages(met, pieces, page_size, buffer_pages)
    filled, exact = rounding(walk, pieces, page_size, codec)
    few = np.array([len(step.token_ids) <= MAX_DECODE_TOKENS for step in steps])[pieces.sequence]
    slots = np.concatenate([np.where(one, host_slots(step), -1) for one, step in zip(left, steps, strict=True)])
    ends = np.cumsum(np.where(few, pieces.count * walk.met, 0))
    first_state = ends - np.where(few, pieces.count * walk.met, 0)
    own, others = [], []
    for begins, until in walk.stretches:
        piece, page = spread(begins, np.where(few, until - begins, 0))
        items = _items(walk, pieces, exact, first_state, piece, page, page_size)
        slot = slots[walk.firsts[pieces.sequence[piece]] + page]
        own.append(torch.from_numpy(items[slot < 0]))
        items[:, 4] = buffer_entry(slot)
        others.append(items[slot >= 0])
    calls = [chunks_of(walk, pieces, exact, begins, until, ~few) for begins, until in walk.stretches]
    merge = _merge_of(pieces, walk, few, first_state, int(ends[-1]))
    return SharedAttention(
        library, host, walk, calls, own, torch.from_numpy(np.concatenate(others)), merge, codec,
        torch.from_numpy(filled),
    )  # fmt: skip


def _items(
    walk: PageWalk, pieces: Pieces, exact: np.ndarray, first_state: np.ndarray, piece: np.ndarray, page: np.ndarray,
    page_size: int,
) -> np.ndarray:  # fmt: skip
    """Items of pieces and pages, see `page_states`."""
    count = pieces.count[piece]
    columns = [
        pieces.row[piece], count, pieces.start[piece], page, walk.table[walk.firsts[pieces.sequence[piece]] + page],
        np.where(page == pieces.start[piece] // page_size, exact[piece], -1), first_state[piece] + page * count,
    ]  # fmt: skip
    return np.stack(columns, axis=1)


def _merge_of(pieces: Pieces, walk: PageWalk, few: np.ndarray, first_state: np.ndarray, num_states: int) -> Merge:
    """Pages of a piece one after the other, each with a state for each of its rows."""
    piece, token = spread(np.zeros_like(pieces.count), np.where(few, pieces.count, 0))
    row, page = spread(np.zeros_like(piece), walk.met[piece])
    order = (first_state[piece] + token)[row] + page * pieces.count[piece][row]
    offsets = np.append(0, np.cumsum(walk.met[piece]))
    return Merge(
        torch.from_numpy(pieces.row[piece] + token), torch.from_numpy(order), torch.from_numpy(offsets), num_states
    )
