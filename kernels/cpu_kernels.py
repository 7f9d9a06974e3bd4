"""The token kernels of a CPU without the native ones: torch's operators."""

from distkv.kernels.activation import swiglu
from distkv.kernels.linear import packed_linear
from distkv.kernels.norm import rms_norm
from distkv.kernels.rope import rope_and_write_kv
from distkv.kernels.token_kernels import TokenKernels, gated

CPU_KERNELS = TokenKernels("torch", rms_norm, rope_and_write_kv, packed_linear, gated(packed_linear, swiglu))
