"""The token kernels of CUDA: Triton's, and cuBLAS for the products."""

from torch import Tensor

from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.norm import rms_norm
from distkv.kernels.cuda.rope import rope_and_write_kv
from distkv.kernels.linear import Linear, gated_linear, plain_linear
from distkv.kernels.token_kernels import TokenKernels


def make_gated_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """See `gated_linear`."""
    return gated_linear(plain_linear(weight, bias), swiglu)


CUDA_KERNELS = TokenKernels("triton", rms_norm, rope_and_write_kv, plain_linear, make_gated_linear)
