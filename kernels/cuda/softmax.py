"""The arithmetic of attention that all kernels share: the state of a row over some keys, and how it grows.

A state is `m`, the largest score in powers of two, rounded up to a whole number; `total`, the sum of the weights
`2 ** (score - m)`; and `acc`, the weighted sum of values. Since m is whole, taking another one scales the sums by a
power of two, which rounds nothing: what m was on the way, and whether the largest of all was known beforehand, changes
no bit. Only the order in which tiles are added to a state, and states to one another, does.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class States(NamedTuple):
    """The states of many rows, fp32; `...` says which rows."""

    acc: Tensor  # [..., D]
    m: Tensor  # [...]
    total: Tensor  # [...]


class TileShape(NamedTuple):
    """How the work is cut up: rows of a program, keys of a tile, and warps. The bits of a state follow from it."""

    rows: int
    keys: int
    num_warps: int


@triton.jit
def power_of_two(exponent):
    """`2 ** exponent` of whole numbers up to 0, exactly; 0 of those below -126, of -inf and of NaN."""
    bounded = tl.where(exponent > -127.0, exponent, -127.0)
    return ((bounded.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def nothing_as_zero(m):
    """What scores are taken relative to: m, or 0 for a row that has seen no key."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def add_tile(scores, values, m, total, acc, SCALE: tl.constexpr):
    """The state `(m, total, acc)` with one more tile of keys.

    `scores` are products of queries and keys, fp32 and not scaled, -inf where a row does not see a key; SCALE brings
    them to powers of two. `values [keys, D]` are in the queries' dtype.
    """
    new_m = tl.maximum(m, tl.ceil(tl.max(scores, 1) * SCALE))
    base = nothing_as_zero(new_m)
    p = tl.exp2(tl.fma(scores, SCALE, -base[:, None]))
    shrink = power_of_two(m - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new_m, total, acc


@triton.jit
def add_state(m, total, acc, other_m, other_total, other_acc):
    """The state of the keys of both, of which those of the second one follow."""
    new_m = tl.maximum(m, other_m)
    base = nothing_as_zero(new_m)
    shrink, weight = power_of_two(m - base), power_of_two(other_m - base)
    return (
        new_m,
        total * shrink + other_total * weight,
        acc * shrink[:, None] + other_acc * weight[:, None],
    )
