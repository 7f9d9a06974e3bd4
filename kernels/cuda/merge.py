"""Merges the states of a sequence's splits into the result, one after the other in logical order, in fp32.

Dims: B sequences, C new tokens per sequence, H query heads, K KV heads, G = H / K, D head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.cuda.softmax import States, nothing_as_zero, power_of_two

STATES = 16
"""States whose loads are under way at a time."""
AHEAD = 128
"""States whose largest scores are looked at together, before any is added."""
COLUMNS = 32
"""Columns of a program. A sequence alone may have thousands of states, so its rows are cut into as many programs as
whole 128-byte lines allow."""


@triton.jit
def _merge_kernel(
    states_acc,
    states_m,
    states_total,
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
    AHEAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = NUM_TOKENS * GROUP
    STRIDE: tl.constexpr = KV_HEADS * ROWS  # rows of a state
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token, query_head = tl.program_id(1) // (KV_HEADS * GROUP), tl.program_id(1) % (KV_HEADS * GROUP)
    sequence = sequences + 6 * tl.program_id(2)
    first_row, num_keys, first_state = tl.load(sequence), tl.load(sequence + 1), tl.load(sequence + 3)
    first_split, end_split = tl.load(sequence + 4).to(tl.int32), tl.load(sequence + 5).to(tl.int32)
    # row of (state, head, token, group) among the states
    row = (first_state * KV_HEADS + query_head // GROUP) * ROWS + token * GROUP + query_head % GROUP

    rows_of_state = tl.full([], STRIDE, tl.int64)

    # whether other launches come before and after is looked up, not compiled in: one binary, and so the same bits
    reached = end_split.to(tl.int64) * split_tokens
    continues, ends, goes_on = first_split > 0, reached >= num_keys, reached < num_keys
    at = (first_row + token) * (KV_HEADS * GROUP) + query_head
    own = at * tl.num_programs(0) + tl.program_id(0)  # each of the programs of a row, lest one overtakes another
    before = tl.load(carry_m + own, mask=continues, other=-float("inf"))
    total = tl.load(carry_total + own, mask=continues, other=0.0)
    acc = tl.load(carry_acc + at * HEAD_DIM + column, mask=column < tl.where(continues, HEAD_DIM, 0), other=0.0)

    # The largest score of all comes first, so that the additions wait for nothing but one another.
    m = before
    for first in range(first_split, end_split, AHEAD):
        state = first + tl.arange(0, AHEAD)
        rows = row + state * rows_of_state
        m = tl.maximum(m, tl.max(tl.load(states_m + rows, mask=state < end_split, other=-float("inf")), 0))
    base = nothing_as_zero(m)
    shrink = power_of_two(before - base)
    total, acc = total * shrink, acc * shrink
    # Whole tiles of STATES, then what is left with masks: what is no state adds 0. Within a tile all is at a constant
    # distance, so that a load is one instruction.
    whole = first_split + (end_split - first_split) // STATES * STATES
    for MASKED in tl.static_range(2):
        begin, stop = (whole, end_split) if MASKED else (first_split, whole)
        for first in range(begin, stop, STATES):
            here = row + first * rows_of_state
            m_at, total_at, acc_at = states_m + here, states_total + here, states_acc + here * HEAD_DIM + column
            for number in tl.static_range(STATES):  # one after the other
                there = first + number < end_split if MASKED else True
                inside = column < (tl.where(there, HEAD_DIM, 0) if MASKED else HEAD_DIM)
                weight = power_of_two(tl.load(m_at + number * STRIDE, mask=there, other=-float("inf")) - base)
                total += tl.load(total_at + number * STRIDE, mask=there, other=0.0) * weight
                acc += tl.load(acc_at + number * STRIDE * HEAD_DIM, mask=inside, other=0.0) * weight

    # zeros where no key was seen; + 0.0 makes 0 of -0, which a sum that has shrunk to nothing may be or not by the cuts
    merged = (acc + 0.0) / tl.where(total > 0, total, 1.0)
    target = result + (first_row + token) * result_stride + query_head * HEAD_DIM + column
    tl.store(target, merged.to(result.dtype.element_ty), mask=column < tl.where(ends, HEAD_DIM, 0))
    tl.store(carry_acc + at * HEAD_DIM + column, acc, mask=column < tl.where(goes_on, HEAD_DIM, 0))
    tl.store(carry_m + own, m, mask=goes_on)
    tl.store(carry_total + own, total, mask=goes_on)


def carry_like(result: Tensor) -> States:
    """Room for the sums of a merge that goes on in a later launch, of a result `[T, H, D]`: m and total are `[T, H,
    pieces of D]`."""
    pieces = *result.shape[:2], triton.cdiv(result.shape[2], COLUMNS)
    return States(*(result.new_empty(shape, dtype=torch.float32) for shape in (result.shape, pieces, pieces)))


def merge_splits(
    states: States,
    sequences: Tensor,
    result: Tensor,
    carry: States | None,
    *,
    num_tokens: int,
    split_tokens: int,
) -> None:
    """Writes the merged states of each sequence to its rows of `result`.

    Shapes:
        states `[states, K, C * G]`: as `decode.decode_splits` writes them
        sequences int64 `[B, 6]`: first row of the result, number of keys, (not used), state of split 0, first split and
            end of the splits of this launch
        result `[T, H, D]`: of any dtype and row stride
    Where a sequence has so many splits that their states are not held all at a time, it goes through several launches
    in order; `carry` of `carry_like` takes its sums from one to the next, and the last one writes the result. It is
    None when every sequence is whole. A sequence with 0 keys gets zeros.
    The bits of a row depend on its states in logical order alone, not on these cuts.
    """
    _, kv_heads, rows, head_dim = states.acc.shape
    num_heads = result.shape[1]
    if not len(sequences):
        return
    _merge_kernel[(triton.cdiv(head_dim, COLUMNS), num_tokens * num_heads, len(sequences))](
        *states,
        sequences,
        *(carry or states),  # the latter are neither read nor written
        result,
        result.stride(0),
        split_tokens,
        GROUP=rows // num_tokens,
        NUM_TOKENS=num_tokens,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        STATES=STATES,
        AHEAD=AHEAD,
        COLUMNS=COLUMNS,
        num_warps=1,
        enable_fp_fusion=True,
    )
