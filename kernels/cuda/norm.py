"""RMSNorm with the residual addition before it on CUDA: see `distkv.kernels.norm`."""

import triton
import triton.language as tl
from torch import Tensor

THREAD_BYTES = 16
"""What a thread reads at a time of each operand."""
MAX_WARPS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """The norm of each row of x, computed in fp32 and rounded once; with `delta`, of the new x.

    `delta` is added to x in place, in fp32 and rounded once to x's dtype, which is the addition of torch; the norm is
    computed from the rounded sum. A row is held in registers by one program, so that its bits depend on it alone.

    Shapes: x and delta `[T, E]`, both contiguous, weight `[E]`, result `[T, E]`, all of one dtype.
    Raises ValueError when x or delta is not contiguous.
    """
    if not (x.is_contiguous() and (delta is None or delta.is_contiguous())):
        raise ValueError("x and delta must be contiguous; call .contiguous() where the view is made")
    num_tokens, hidden = x.shape
    result = x.new_empty(num_tokens, hidden)
    if num_tokens:
        block = triton.next_power_of_2(hidden)
        warps = min(max(block * x.element_size() // (32 * THREAD_BYTES), 1), MAX_WARPS)
        _rms_norm[(num_tokens,)](
            x,
            delta,
            weight,
            result,
            eps,
            HIDDEN=hidden,
            BLOCK=block,
            HAS_DELTA=delta is not None,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return result


@triton.jit
def _rms_norm(x, delta, weight, result, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    row = tl.load(x + at, mask=inside, other=0)
    if HAS_DELTA:
        added = tl.load(delta + at, mask=inside, other=0)
        row = (row.to(tl.float32) + added.to(tl.float32)).to(row.dtype)
        tl.store(x + at, row, mask=inside)
    values = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + eps)
    normed = values * scale * tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(result + at, normed.to(row.dtype), mask=inside)
