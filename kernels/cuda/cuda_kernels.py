"""The token kernels of CUDA: Triton's, and cuBLAS for the products."""

from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.norm import rms_norm
from distkv.kernels.cuda.rope import rope_and_write_kv
from distkv.kernels.linear import plain_linear
from distkv.kernels.token_kernels import TokenKernels, gated

CUDA_KERNELS = TokenKernels("triton", rms_norm, rope_and_write_kv, plain_linear, gated(plain_linear, swiglu))
