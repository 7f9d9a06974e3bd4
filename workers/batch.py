"""Turns a step plan into the tensors that all layers share, and runs attention over them.

Dims: T tokens of the step, H query heads, K KV heads, G = H / K, S page_size, D head_dim; within a decode group,
B sequences of C tokens each, P pages of all of them.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.attention import decode_attention, prefill_attention
from distkv.storage.page_size import pages_for
from distkv.workers.step_plan import SequencePlan, StepPlan

# Sequences with at most this many new tokens take the decode path, which reads each page once for all of them.
MAX_DECODE_TOKENS = 8


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with the same number of new tokens; tensors as in `decode_attention`."""

    tokens: Tensor | None  # int64 [B * C], rows of the step; None when the group is the whole step
    num_sequences: int
    runs: list[tuple[int, int]]
    row_owner: Tensor | None
    mask: Tensor
    order: Tensor | None


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence's chunk of a prompt."""

    tokens: slice
    prefix_pages: Tensor  # int64
    prefix_len: int


@dataclass(frozen=True)
class Batch:
    """A step, ready to run."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    context: Tensor  # int64 [T], see RotaryEmbedding.angles
    page: Tensor  # int64 [T], device slot of each token
    offset: Tensor  # int64 [T], place in that page
    decode: list[DecodeGroup]
    prefill: list[PrefillChunk]
    logit_rows: Tensor  # int64, rows of the step whose logits are wanted

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor) -> Tensor:
        """Attention of all new tokens of one layer, whose keys and values are already in their pages.

        Shapes: q `[T, H, D]`; k, v `[T, K, D]`; layer_pool `[2, pages, K, S, D]`. Returns `[T, H * D]`.
        """
        k_pages, v_pages = layer_pool[0], layer_pool[1]
        num_kv_heads = k.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in self.decode:
            rows = q if group.tokens is None else q[group.tokens]
            packed = pack_queries(rows, group.num_sequences, num_kv_heads)
            result, _ = decode_attention(packed, k_pages, v_pages, group.runs, group.row_owner, group.mask, group.order)
            unpacked = unpack_queries(result, *rows.shape[:2])
            if group.tokens is None:
                return unpacked.flatten(1)
            out[group.tokens] = unpacked
        for chunk in self.prefill:
            mine = chunk.tokens
            queries = q[mine].unflatten(1, (num_kv_heads, -1))
            result, _ = prefill_attention(
                queries, k[mine], v[mine], k_pages, v_pages, chunk.prefix_pages, chunk.prefix_len
            )  # fmt: skip
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


def build_batch(plan: StepPlan, page_size: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """The tensors of a plan for a rank with `group_size` query heads per KV head; masks are in `dtype`."""
    token_ids, positions, context, pages, logit_rows = [], [], [], [], []
    decode: dict[int, list[tuple[int, SequencePlan]]] = defaultdict(list)
    prefill = []
    first = 0
    for sequence in plan.sequences:
        count = len(sequence.token_ids)
        position = np.arange(sequence.start, sequence.start + count)
        slots = np.asarray(sequence.slots)
        token_ids.append(np.asarray(sequence.token_ids))
        positions.append(position)
        context.append(np.maximum(position + 1, sequence.prompt_len))
        pages.append(slots[position // page_size])
        logit_rows.append(np.arange(first + count - sequence.num_logits, first + count))
        if count <= MAX_DECODE_TOKENS:
            decode[count].append((first, sequence))
        else:
            prefix = torch.from_numpy(slots[: pages_for(sequence.start, page_size)]).to(device)
            prefill.append(PrefillChunk(slice(first, first + count), prefix, sequence.start))
        first += count
    whole = len(decode) == 1 and not prefill

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    position_T = tensor(positions)
    groups = [
        _decode_group(count, members, whole, page_size, group_size, dtype, device) for count, members in decode.items()
    ]
    return Batch(
        token_ids=tensor(token_ids),
        positions=position_T,
        context=tensor(context),
        page=tensor(pages),
        offset=position_T % page_size,
        decode=groups,
        prefill=prefill,
        logit_rows=tensor(logit_rows),
    )


def _decode_group(
    count: int, members: list[tuple[int, SequencePlan]], whole: bool, page_size: int, group_size: int,
    dtype: torch.dtype, device: torch.device,
) -> DecodeGroup:  # fmt: skip
    """`members` are (first row of the step, sequence) with `count` new tokens each."""
    starts = np.array([sequence.start for _, sequence in members])
    num_pages = -(-(starts + count) // page_size)
    slots = np.concatenate([sequence.slots[:n] for (_, sequence), n in zip(members, num_pages, strict=True)])
    owner = np.repeat(np.arange(len(members)), num_pages)
    logical = np.concatenate([np.arange(n) for n in num_pages])
    visit, runs = _visiting_order(slots)
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
    mask = mask[:, None].to(device)

    order = None
    if len(members) > 1 or before.any() or not (visit[:-1] < visit[1:]).all():
        states = np.arange(len(slots))[:, None] * rows + np.arange(rows)
        states[np.repeat(before, group_size, axis=1)] = len(slots) * rows
        table = np.full((len(members), num_pages.max(), rows), len(slots) * rows)
        table[owner, logical] = states
        order = torch.from_numpy(table).to(device)
    tokens = None
    if not whole:
        tokens = torch.from_numpy(np.concatenate([np.arange(first, first + count) for first, _ in members])).to(device)
    row_owner = torch.from_numpy(owner).to(device) if len(members) > 1 else None
    return DecodeGroup(tokens, len(members), runs, row_owner, mask, order)


def _visiting_order(slots: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The order in which to visit pages, as indices into `slots`, and the runs of neighbours `(first slot, pages)` in
    it.

    A slot that several sequences share is visited once for each, in rounds, so that shared prefixes form runs too.
    """
    by_slot = np.argsort(slots, kind="stable")
    ordered = slots[by_slot]
    occurrence = np.arange(len(slots)) - np.searchsorted(ordered, ordered)
    again = np.lexsort((ordered, occurrence))
    ordered = ordered[again]
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1  # a new round steps back, since it is a part of the one before
    edges = [0, *breaks.tolist(), len(slots)]
    runs = [(int(ordered[a]), b - a) for a, b in pairwise(edges)]
    return by_slot[again], runs
