"""SwiGLU on CUDA: see `distkv.kernels.activation`."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns of a program of 4 warps: 8 of a thread, which are 16 bytes of a half precision type."""


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a fused projection, computed in fp32 and rounded once.

    Shapes: gate_up `[T, 2 * I]`, contiguous, the gate in the first half; result `[T, I]`.
    Raises ValueError when gate_up is not contiguous.
    """
    if not gate_up.is_contiguous():
        raise ValueError("gate_up must be contiguous; call .contiguous() where the view is made")
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(num_tokens, width)
    if num_tokens:
        _swiglu[(num_tokens, triton.cdiv(width, BLOCK))](
            gate_up, result, WIDTH=width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return result


@triton.jit
def _swiglu(gate_up, result, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(at, mask=inside, other=0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(result + row * WIDTH + column, value.to(result.dtype.element_ty), mask=inside)
