"""The token kernels of a CPU without the native ones: torch's operators."""

from torch import Tensor

from distkv.kernels.activation import swiglu
from distkv.kernels.linear import Linear, gated_linear, packed_linear
from distkv.kernels.norm import rms_norm
from distkv.kernels.rope import rope_and_write_kv
from distkv.kernels.token_kernels import TokenKernels


def make_gated_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """See `gated_linear`."""
    return gated_linear(packed_linear(weight, bias), swiglu)


CPU_KERNELS = TokenKernels("torch", rms_norm, rope_and_write_kv, packed_linear, make_gated_linear)
