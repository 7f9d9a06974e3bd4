"""The kernels that work token by token, as the device of a rank has them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenKernels:
    """The functions of this name in `norm.py`, `activation.py` and `rope.py`, or in `cuda/`.

    Common to both: `rope_and_write_kv` may rotate in place, so `qkv` is used up.
    """

    rms_norm: Callable[..., Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rope_and_write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def token_kernels(device: torch.device) -> TokenKernels:
    """Those of `cuda/` on a CUDA device, the ones in torch on the CPU, where Triton need not be installed."""
    if device.type == "cuda":
        from distkv.kernels.cuda import activation, norm, rope
    else:
        from distkv.kernels import activation, norm, rope  # type: ignore[no-redef]
    return TokenKernels(norm.rms_norm, activation.swiglu, rope.rope_and_write_kv)
