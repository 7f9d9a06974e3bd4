"""Attention of a step on a CPU: runs of neighbouring pages as views, everything else gathered.

Dims: T tokens of the step, H query heads, K KV heads, G = H / K, S page_size, D head_dim; within a decode group,
B sequences of C tokens each, P pages of all of them.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.attention import Block, decode_attention, prefill_attention
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.paging import PREFILL_SPLIT, pages_for
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS


@dataclass(frozen=True)
class Run:
    """Neighbouring pages that attention reads as one view."""

    streamed: bool  # in a buffer of the staging ring, else in the device pool
    next_load: bool  # the first run of its buffer
    first: int  # slot, or index in the buffer
    count: int


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with the same number of new tokens; tensors as in `decode_attention`, over the pages of all runs."""

    tokens: Tensor | None  # int64 [B * C], rows of the step; None when the group is the whole step
    num_sequences: int
    runs: list[Run]  # the resident pages first
    loads: list[Load]
    row_owner: Tensor | None
    mask: Tensor
    order: Tensor | None

    def blocks(self, layer_pool: Tensor, stream: Stream | None) -> Iterator[Block]:
        """The runs as `decode_attention` takes them."""
        first = 0
        buffer = layer_pool.transpose(0, 1)[:0]
        for run in self.runs:
            if run.next_load:
                assert stream is not None
                buffer = stream.take()
            pages = slice(run.first, run.first + run.count)
            k, v = (
                (buffer[pages, 0], buffer[pages, 1]) if run.streamed else (layer_pool[0, pages], layer_pool[1, pages])
            )  # type: ignore[index]
            span = slice(first, first + run.count)
            yield k, v, None if self.row_owner is None else self.row_owner[span], self.mask[span]
            first += run.count


@dataclass(frozen=True)
class PrefixPiece:
    """PREFILL_SPLIT tokens of a prefix, or what is left of it."""

    num_tokens: int
    num_pages: int
    resident: Tensor  # int64, indices of its resident pages within the piece
    slots: Tensor  # int64, their device slots
    cold: Tensor  # int64, indices of its cold pages within the piece, in the order of `load`
    load: Load

    def gather(self, layer_pool: Tensor, stream: Stream | None) -> tuple[Tensor, Tensor]:
        """K and V of the piece side by side, `[K, num_tokens, D]` each."""
        if not self.load:
            pages = layer_pool[:, self.slots]
        else:
            assert stream is not None
            pages = layer_pool.new_empty(2, self.num_pages, *layer_pool.shape[2:])
            pages[:, self.resident] = layer_pool[:, self.slots]
            pages[:, self.cold] = stream.take().transpose(0, 1)
        k, v = pages.transpose(1, 2).flatten(2, 3)[:, :, : self.num_tokens]
        return k, v


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence's chunk of a prompt."""

    tokens: slice
    prefix: list[PrefixPiece]


@dataclass(frozen=True)
class CpuAttention:
    """An `Attention`, see `batch.py`."""

    decode: list[DecodeGroup]
    prefill: list[PrefillChunk]

    @property
    def loads(self) -> list[Load]:
        """See `Attention`."""
        pieces = [piece.load for chunk in self.prefill for piece in chunk.prefix if piece.load]
        return [load for group in self.decode for load in group.loads] + pieces

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`."""
        num_kv_heads = k.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in self.decode:
            rows = q if group.tokens is None else q[group.tokens]
            packed = pack_queries(rows, group.num_sequences, num_kv_heads)
            result, _ = decode_attention(packed, group.blocks(layer_pool, stream), group.order)
            unpacked = unpack_queries(result, *rows.shape[:2])
            if group.tokens is None:
                return unpacked.flatten(1)
            out[group.tokens] = unpacked
        for chunk in self.prefill:
            mine = chunk.tokens
            queries = q[mine].unflatten(1, (num_kv_heads, -1))
            prefix = (piece.gather(layer_pool, stream) for piece in chunk.prefix)
            result, _ = prefill_attention(queries, k[mine], v[mine], prefix)
            out[mine] = result.flatten(1, 2)
        return out.flatten(1)


def pack_queries(q: Tensor, num_sequences: int, num_kv_heads: int) -> Tensor:
    """`[B * C, H, D]` -> `[B, K, C * G, D]`: all rows that meet the same keys."""
    _, _, head_dim = q.shape
    grouped = q.reshape(num_sequences, -1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim)
    return grouped.transpose(1, 2).reshape(num_sequences, num_kv_heads, -1, head_dim)


def unpack_queries(packed: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    """The inverse of `pack_queries`: `[B, K, C * G, D]` -> `[B * C, H, D]`."""
    num_sequences, num_kv_heads, _, head_dim = packed.shape
    count = num_tokens // num_sequences
    grouped = packed.reshape(num_sequences, num_kv_heads, count, -1, head_dim)
    return grouped.transpose(1, 2).reshape(num_tokens, num_heads, head_dim)


def plan_cpu_attention(
    steps: list[SequenceStep], page_size: int, group_size: int, buffer_pages: int, dtype: torch.dtype
) -> CpuAttention:
    """The attention of a step for a rank with `group_size` query heads per KV head and `buffer_pages` pages in a buffer
    of its staging ring; masks are in `dtype`."""
    decode: dict[int, list[tuple[int, SequenceStep]]] = defaultdict(list)
    prefill = []
    first = 0
    for sequence in steps:
        count = len(sequence.token_ids)
        if count <= MAX_DECODE_TOKENS:
            decode[count].append((first, sequence))
        else:
            prefill.append(
                PrefillChunk(slice(first, first + count), prefix_pieces(sequence.pages, sequence.start, page_size))
            )
        first += count
    whole = len(decode) == 1 and not prefill
    groups = [
        _decode_group(count, members, whole, page_size, group_size, buffer_pages, dtype)
        for count, members in decode.items()
    ]
    return CpuAttention(groups, prefill)


def prefix_pieces(pages: np.ndarray, prefix_len: int, page_size: int) -> list[PrefixPiece]:
    """The tokens before a chunk, in pieces; `pages` are locations, as in `SequenceStep`."""
    per_piece = max(1, PREFILL_SPLIT // page_size)
    num_pages = pages_for(prefix_len, page_size)
    pieces = []
    for first in range(0, num_pages, per_piece):
        piece = pages[first : min(first + per_piece, num_pages)]
        resident, cold = np.flatnonzero(piece >= 0), np.flatnonzero(piece < 0)
        cold = cold[np.argsort(-piece[cold], kind="stable")]
        slots, load = piece[resident], piece[cold].tolist()
        resident_at, slot_at, cold_at = (torch.from_numpy(index) for index in (resident, slots, cold))
        num_tokens = min(len(piece) * page_size, prefix_len - first * page_size)
        pieces.append(PrefixPiece(num_tokens, len(piece), resident_at, slot_at, cold_at, load))
    return pieces


def _decode_group(
    count: int, members: list[tuple[int, SequenceStep]], whole: bool, page_size: int, group_size: int,
    buffer_pages: int, dtype: torch.dtype,
) -> DecodeGroup:  # fmt: skip
    """`members` are (first row of the step, sequence) with `count` new tokens each."""
    starts = np.array([sequence.start for _, sequence in members])
    num_pages = -(-(starts + count) // page_size)
    pages = np.concatenate([sequence.pages[:n] for (_, sequence), n in zip(members, num_pages, strict=True)])
    owner = np.repeat(np.arange(len(members)), num_pages)
    logical = np.concatenate([np.arange(n) for n in num_pages])
    visit, runs, loads = _visit(pages, buffer_pages)
    owner, logical = owner[visit], logical[visit]

    # mask[p, c, s]: token c of the owner sees key s of the page; a token before the page gets key 0 and is dropped
    query_position = starts[owner, None] + np.arange(count)
    key_position = logical[:, None] * page_size + np.arange(page_size)
    before = query_position < key_position[:, :1]
    hidden = key_position[:, None] > query_position[:, :, None]
    hidden[..., 0] &= ~before
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
    rows = count * group_size
    if count > 1:  # else one row of the mask does for the whole group
        mask = mask.repeat_interleave(group_size, dim=1)
    mask = mask[:, None]

    order = None
    if len(members) > 1 or before.any() or not (visit[:-1] < visit[1:]).all():
        states = np.arange(len(pages))[:, None] * rows + np.arange(rows)
        states[np.repeat(before, group_size, axis=1)] = len(pages) * rows
        table = np.full((len(members), num_pages.max(), rows), len(pages) * rows)
        table[owner, logical] = states
        order = torch.from_numpy(table)
    tokens = None
    if not whole:
        tokens = torch.from_numpy(np.concatenate([np.arange(first, first + count) for first, _ in members]))
    row_owner = torch.from_numpy(owner) if len(members) > 1 else None
    return DecodeGroup(tokens, len(members), runs, loads, row_owner, mask, order)


def _visit(pages: np.ndarray, buffer_pages: int) -> tuple[np.ndarray, list[Run], list[Load]]:
    """The order in which to visit pages, as indices into `pages`, their locations; its runs; and what must be loaded.

    Resident pages come first, in the order of the pool; then cold ones by tier and slot, each loaded once however many
    sequences share it.
    """
    resident, cold = np.flatnonzero(pages >= 0), np.flatnonzero(pages < 0)
    order, neighbours = _visiting_order(pages[resident])
    visits = [resident[order]]
    runs = [Run(False, False, first, count) for first, count in neighbours]
    loads: list[Load] = []
    if not len(cold):
        return visits[0], runs, loads
    distinct, number = np.unique(-pages[cold], return_inverse=True)  # a higher slot has a lower location
    for first in range(0, len(distinct), buffer_pages):
        members = np.flatnonzero((number >= first) & (number < first + buffer_pages))
        order, neighbours = _visiting_order(number[members] - first)
        visits.append(cold[members[order]])
        runs += [Run(True, index == 0, *run) for index, run in enumerate(neighbours)]
        loads.append((-distinct[first : first + buffer_pages]).tolist())
    return np.concatenate(visits), runs, loads


def _visiting_order(slots: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The order in which to visit pages, as indices into `slots`, and the runs of neighbours `(first slot, pages)` in
    it.

    A slot that several sequences share is visited once for each, in rounds, so that shared prefixes form runs too.
    """
    if not len(slots):
        return slots, []
    by_slot = np.argsort(slots, kind="stable")
    ordered = slots[by_slot]
    occurrence = np.arange(len(slots)) - np.searchsorted(ordered, ordered)
    again = np.lexsort((ordered, occurrence))
    ordered = ordered[again]
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1  # a new round steps back, since it is a part of the one before
    edges = [0, *breaks.tolist(), len(slots)]
    runs = [(int(ordered[a]), b - a) for a, b in pairwise(edges)]
    return by_slot[again], runs
