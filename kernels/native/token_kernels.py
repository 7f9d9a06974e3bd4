"""The token kernels of a CPU in C++, see `kernels.cpp`: the bits of a row depend on nothing but the row."""

import torch
from torch import Tensor

from distkv.kernels.linear import Linear
from distkv.kernels.native.library import DTYPES, Library
from distkv.kernels.token_kernels import TokenKernels


def native_token_kernels(library: Library) -> TokenKernels:
    """Those of a library. Tensors are on the CPU and, unless it is said otherwise, contiguous."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
        assert x.is_contiguous() and (delta is None or delta.is_contiguous())
        out = torch.empty_like(x)
        library.rms_norm(
            DTYPES[x.dtype], x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), eps,
            x.shape[:-1].numel(), x.shape[-1], out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rope_and_write_kv(
        qkv: Tensor, cos: Tensor, sin: Tensor, layer_pool: Tensor, page: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In place: what it returns are parts of qkv."""
        tokens, all_heads, dim = qkv.shape
        _, num_pages, kv_heads, page_size, _ = layer_pool.shape
        heads = all_heads - 2 * kv_heads
        assert qkv.stride(1) == dim and qkv.stride(2) == 1 and layer_pool.is_contiguous()
        library.rope_and_write(
            DTYPES[qkv.dtype], qkv.data_ptr(), qkv.stride(0), tokens, heads, kv_heads, dim, cos.data_ptr(),
            sin.data_ptr(), layer_pool.data_ptr(), num_pages, page_size, page.data_ptr(), offset.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
        return _packed_linear(library, weight, bias, gated=False)

    def make_gated_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
        return _packed_linear(library, weight, bias, gated=True)

    return TokenKernels(
        f"native {library.instruction_set}", rms_norm, rope_and_write_kv, make_linear, make_gated_linear
    )


def _packed_linear(library: Library, weight: Tensor, bias: Tensor | None, gated: bool) -> Linear:
    """A product with a copy of the weight in panels of 16 outputs, see `gemm.hpp`."""
    (outputs, depth), dtype = weight.shape, DTYPES[weight.dtype]
    width = outputs // 2 if gated else outputs
    packed = weight.new_empty(library.packed_size(dtype, outputs, depth, gated))
    source = weight.contiguous()
    library.pack_weight(dtype, source.data_ptr(), outputs, depth, gated, packed.data_ptr(), torch.get_num_threads())

    def run(x: Tensor) -> Tensor:
        assert x.shape[1] == depth and x.stride(1) == 1 and x.dtype == packed.dtype
        out = x.new_empty(len(x), width)
        if len(x):
            library.linear(
                dtype, x.data_ptr(), len(x), x.stride(0), packed.data_ptr(),
                None if bias is None else bias.data_ptr(), outputs, depth, gated, out.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
        return out

    return run
