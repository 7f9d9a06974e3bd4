"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), fused with the write into KV pages."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs `(x[i], x[i + head_dim / 2])`, Hugging Face's pairing, in fp32.

    Shapes: x `[tokens, heads, head_dim]`, cos and sin fp32 `[tokens, 1, head_dim / 2]`; result of x's shape and dtype.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotated[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    rotated[..., half:] = (second * cos).addcmul_(first, sin)
    return rotated


def rope_and_write_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, layer_pool: Tensor, page: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates queries and keys and writes keys and values into their pages, in place.

    Shapes (heads = query heads + 2 * kv_heads, in the order q, k, v):
        qkv `[tokens, heads, head_dim]`; cos, sin fp32 `[tokens, 1, head_dim / 2]`
        layer_pool `[2, pages, kv_heads, page_size, head_dim]`, one layer of the device pool, of qkv's dtype
        page, offset int64 `[tokens]`: the device page of each token and its index in that page
    Returns rotated queries `[tokens, query heads, head_dim]`, and keys and values `[tokens, kv_heads, head_dim]` as
    they were stored; all in qkv's dtype.
    """
    kv_heads = layer_pool.shape[2]
    rotated = rotate(qkv[:, :-kv_heads], cos, sin)
    q, k, v = rotated[:, :-kv_heads], rotated[:, -kv_heads:], qkv[:, -kv_heads:]
    layer_pool[0][page, :, offset] = k
    layer_pool[1][page, :, offset] = v
    return q, k, v
