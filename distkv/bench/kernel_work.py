"""How much each kernel has to do: bytes that it cannot but move, operations that it cannot but compute.

Dims: T tokens, H query heads, K KV heads, D head_dim.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionShape:
    """One layer of a model, as a rank holds it; that of Llama-3-8B unless changed."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 256
    dtype: torch.dtype = torch.bfloat16

    def kv_bytes(self, num_tokens: int) -> int:
        """The KV bytes of one layer: `2 * tokens * KV heads * head_dim * bytes`."""
        return 2 * num_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize

    def prefill_flops(self, num_tokens: int) -> int:
        """The operations of causal attention over a whole prompt: two products of `2 * H * D * T^2`, of which half is
        needed."""
        return 4 * self.query_heads * self.head_dim * num_tokens**2 // 2


def norm_bytes(num_tokens: int, hidden: int, itemsize: int, residual: bool) -> int:
    """Read and written by `rms_norm`; with a residual that is read too, and the sum is written."""
    return ((4 if residual else 2) * num_tokens + 1) * hidden * itemsize


def swiglu_bytes(num_tokens: int, intermediate: int, itemsize: int) -> int:
    """Two halves read, one written."""
    return 3 * num_tokens * intermediate * itemsize


def rope_bytes(num_tokens: int, shape: AttentionShape) -> int:
    """Queries, keys and values read; queries and keys written in place, keys and values to pages; angles in fp32 and
    the two indices of each token read."""
    heads = 2 * shape.query_heads + 5 * shape.kv_heads
    return num_tokens * (heads * shape.head_dim * shape.dtype.itemsize + 4 * shape.head_dim + 16)
