"""The kernels that work on tokens one by one, for either kind of device."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RmsNorm(Protocol):
    """See `norm.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor: ...


class SwiGlu(Protocol):
    """See `activation.swiglu`."""

    def __call__(self, gate_up: Tensor) -> Tensor: ...


class RopeAndWriteKv(Protocol):
    """See `rope.rope_and_write_kv`."""

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, layer_pool: Tensor, page: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class TokenKernels:
    """One implementation of each."""

    rms_norm: RmsNorm
    swiglu: SwiGlu
    rope_and_write_kv: RopeAndWriteKv


def token_kernels(on_cuda: bool) -> TokenKernels:
    """Triton's kernels for CUDA, torch's operators for a CPU."""
    if on_cuda:
        from distkv.kernels.cuda.activation import swiglu
        from distkv.kernels.cuda.norm import rms_norm
        from distkv.kernels.cuda.rope import rope_and_write_kv
    else:
        from distkv.kernels.activation import swiglu
        from distkv.kernels.norm import rms_norm
        from distkv.kernels.rope import rope_and_write_kv
    return TokenKernels(rms_norm, swiglu, rope_and_write_kv)
