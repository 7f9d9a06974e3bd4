"""Merges the states of a sequence's splits into the result, in logical order and in fp32.

A state is the normalised output over some keys and the log-sum-exp of their scores, so that states of disjoint keys
merge exactly (Dao et al. 2022, https://arxiv.org/abs/2205.14135).

Dims: B sequences, C new tokens per sequence, H query heads, K KV heads, G = H / K, D head_dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# States taken at once and columns of a program: constants, since the order of additions follows from them. A sequence
# alone may have thousands of states, so its rows are cut into as many programs as whole 128-byte lines allow.
STATES = 64
COLUMNS = 32


@triton.jit
def _merge_kernel(
    out,
    lse,
    sequences,
    carry_acc,
    carry_m,
    carry_total,
    result,
    result_stride: tl.int64,
    split_tokens: tl.int32,
    GROUP: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = NUM_TOKENS * GROUP
    LOG2_E: tl.constexpr = 1.4426950408889634
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token, query_head = tl.program_id(1) // (KV_HEADS * GROUP), tl.program_id(1) % (KV_HEADS * GROUP)
    sequence = sequences + 6 * tl.program_id(2)
    first_row, num_keys, first_state = tl.load(sequence), tl.load(sequence + 1), tl.load(sequence + 3)
    first_split, end_split = tl.load(sequence + 4).to(tl.int32), tl.load(sequence + 5).to(tl.int32)
    fits = column < HEAD_DIM
    # row of (state, head, token, group) in out and lse
    row = (first_state * KV_HEADS + query_head // GROUP) * ROWS + token * GROUP + query_head % GROUP

    # whether other launches come before and after is looked up, not compiled in: one binary, and so the same bits
    reached = end_split.to(tl.int64) * split_tokens
    continues, ends, goes_on = first_split > 0, reached >= num_keys, reached < num_keys
    at = (first_row + token) * (KV_HEADS * GROUP) + query_head
    own = at * tl.num_programs(0) + tl.program_id(0)  # each of the programs of a row, lest one overtakes another
    m = tl.load(carry_m + own, mask=continues, other=-float("inf"))
    total = tl.load(carry_total + own, mask=continues, other=0.0)
    acc = tl.load(carry_acc + at * HEAD_DIM + column, mask=column < tl.where(continues, HEAD_DIM, 0), other=0.0)
    for first in tl.range(first_split, end_split, STATES, num_stages=3):
        state = first + tl.arange(0, STATES)
        there = state < end_split
        rows = row + state.to(tl.int64) * (KV_HEADS * ROWS)
        x = tl.load(lse + rows, mask=there, other=-float("inf")) * LOG2_E
        part = tl.load(out + rows[:, None] * HEAD_DIM + column, mask=there[:, None] & fits, other=0.0)
        new_m = tl.maximum(m, tl.max(x, 0))
        base = tl.where(new_m == -float("inf"), 0.0, new_m)
        weight = tl.exp2(x - base)
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        m = new_m

    merged = acc / tl.where(total > 0, total, 1.0)  # zeros where no key was seen
    target = result + (first_row + token) * result_stride + query_head * HEAD_DIM + column
    tl.store(target, merged.to(result.dtype.element_ty), mask=column < tl.where(ends, HEAD_DIM, 0))
    tl.store(carry_acc + at * HEAD_DIM + column, acc, mask=column < tl.where(goes_on, HEAD_DIM, 0))
    tl.store(carry_m + own, m, mask=goes_on)
    tl.store(carry_total + own, total, mask=goes_on)


class Carry(NamedTuple):
    """Sums of a merge that goes on in a later launch, in fp32."""

    acc: Tensor  # [T, H, D]
    m: Tensor  # [T, H, pieces of D]
    total: Tensor  # [T, H, pieces of D]

    @classmethod
    def like(cls, result: Tensor) -> "Carry":
        """Room for those of a result `[T, H, D]`."""
        pieces = *result.shape[:2], triton.cdiv(result.shape[2], COLUMNS)
        return cls(*(result.new_empty(shape, dtype=torch.float32) for shape in (result.shape, pieces, pieces)))


def merge_splits(
    out: Tensor,
    lse: Tensor,
    sequences: Tensor,
    result: Tensor,
    carry: Carry | None,
    *,
    num_tokens: int,
    split_tokens: int,
) -> None:
    """Writes the merged states of each sequence to its rows of `result`.

    Shapes:
        out fp32 `[states, K, C * G, D]`, lse fp32 `[states, K, C * G]`: as `decode.decode_splits` writes them
        sequences int64 `[B, 6]`: first row of the result, number of keys, (not used), state of split 0, first split and
            end of the splits of this launch
        result `[T, H, D]`: of any dtype and row stride
    Where a sequence has so many splits that their states are not held all at a time, it goes through several launches
    in order, which meet at multiples of STATES splits; `carry` takes its sums from one to the next, and the last one
    writes the result. It is None when every sequence is whole. A sequence with 0 keys gets zeros.
    The bits of a row depend on its states in logical order alone, not on these cuts.
    """
    _, kv_heads, rows, head_dim = out.shape
    num_heads = result.shape[1]
    if not len(sequences):
        return
    acc, m, total = carry or (out, lse, lse)  # the latter are neither read nor written
    _merge_kernel[(triton.cdiv(head_dim, COLUMNS), num_tokens * num_heads, len(sequences))](
        out,
        lse,
        sequences,
        acc,
        m,
        total,
        result,
        result.stride(0),
        split_tokens,
        GROUP=rows // num_tokens,
        NUM_TOKENS=num_tokens,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        STATES=STATES,
        COLUMNS=COLUMNS,
        num_warps=2,
        enable_fp_fusion=True,
    )
