"""The token kernels of CUDA: Triton's, with products by cuBLAS, or by Triton too where no row may depend on others."""

from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.linear import fixed_order_gated_linear, fixed_order_linear
from distkv.kernels.cuda.norm import rms_norm
from distkv.kernels.cuda.rope import rope_and_write_kv
from distkv.kernels.linear import plain_linear
from distkv.kernels.token_kernels import TokenKernels, gated

CUDA_KERNELS = TokenKernels("triton", rms_norm, rope_and_write_kv, plain_linear, gated(plain_linear, swiglu))
BATCH_INVARIANT_KERNELS = TokenKernels(
    "triton, batch invariant", rms_norm, rope_and_write_kv, fixed_order_linear, fixed_order_gated_linear
)
