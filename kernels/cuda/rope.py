"""RoPE fused with the write into KV pages on CUDA: see `distkv.kernels.rope`."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_HEADS = 8
"""Heads of a program."""
THREAD_BYTES = 16
"""What a thread reads at a time of each half of a head."""


def rope_and_write_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, layer_pool: Tensor, page: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates queries and keys in place, in fp32 with one rounding, and writes keys and values into their pages.

    A token whose page is negative is padding: nothing of it is written to the pool.

    Shapes (heads H + 2 * K in the order q, k, v):
        qkv `[T, H + 2 * K, D]`, contiguous; cos, sin fp32 `[T, 1, D / 2]`, contiguous
        layer_pool `[2, pages, K, S, D]` of qkv's dtype, the last three dims contiguous
        page, offset int64 `[T]`
    Returns the views q `[T, H, D]` and k, v `[T, K, D]` of qkv. Raises ValueError for another layout.
    """
    num_tokens, num_heads, head_dim = qkv.shape
    kv_heads, page_size = layer_pool.shape[2:4]
    if not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("qkv, cos and sin must be contiguous; call .contiguous() where the view is made")
    if layer_pool.stride()[2:] != (page_size * head_dim, head_dim, 1):
        raise ValueError(f"a page of the pool must be contiguous [K, S, D]; the strides are {layer_pool.stride()}")
    if num_tokens:
        block_half = triton.next_power_of_2(head_dim // 2)
        _rope_and_write_kv[(num_tokens, triton.cdiv(num_heads, BLOCK_HEADS))](
            qkv,
            cos,
            sin,
            layer_pool,
            layer_pool.stride(0),
            layer_pool.stride(1),
            page,
            offset,
            NUM_HEADS=num_heads,
            KV_HEADS=kv_heads,
            PAGE_SIZE=page_size,
            HALF=head_dim // 2,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=block_half,
            num_warps=max(BLOCK_HEADS * block_half * qkv.element_size() // (32 * THREAD_BYTES), 1),
            enable_fp_fusion=True,
        )
    return qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads], qkv[:, -kv_heads:]


@triton.jit
def _rope_and_write_kv(
    qkv,
    cos,
    sin,
    pool,
    stride_kv,
    stride_page,
    pages,
    offsets,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program (token, block of heads); of a head it holds the two halves, whose elements are pairs."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < NUM_HEADS) & (column < HALF)
    source = qkv + (token * NUM_HEADS + head) * (2 * HALF) + column
    first = tl.load(source, mask=inside, other=0)
    second = tl.load(source + HALF, mask=inside, other=0)

    # values, the last heads, are only copied
    rotates = head < NUM_HEADS - KV_HEADS
    # each head reads them for itself, from the cache: a row shared by all would pass through shared memory
    angle = token * HALF + column + tl.zeros_like(head)
    c = tl.load(cos + angle, mask=inside, other=0)
    s = tl.load(sin + angle, mask=inside, other=0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    first = tl.where(rotates, (x * c - y * s).to(first.dtype), first)
    second = tl.where(rotates, (y * c + x * s).to(second.dtype), second)
    tl.store(source, first, mask=inside & rotates)
    tl.store(source + HALF, second, mask=inside & rotates)

    page = tl.load(pages + token)
    if page >= 0:
        kv_head = head - (NUM_HEADS - 2 * KV_HEADS)
        written = inside & (kv_head >= 0)
        is_value = kv_head >= KV_HEADS
        kv_head = tl.where(is_value, kv_head - KV_HEADS, kv_head)
        start = page * stride_page + (kv_head * PAGE_SIZE + tl.load(offsets + token)) * (2 * HALF)
        target = pool + is_value.to(tl.int64) * stride_kv + start + column
        tl.store(target, first, mask=written)
        tl.store(target + HALF, second, mask=written)
