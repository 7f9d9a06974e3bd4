"""What decode attention over resident pages is made of: its splits, its merge, and the mere reading of the pages."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.cuda.merge import carry_like, merge_splits
from distkv.workers.attention.cuda import CudaAttention, new_states

READ_TOKENS = 64  # of a tile


@triton.jit
def _read_pages(
    pool, table, out, part_stride, num_pages, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    at = tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    top = tl.full([BLOCK_N, HEAD_DIM], -float("inf"), tl.float32)
    for item in range(tl.program_id(1), num_pages, tl.num_programs(1)):
        keys = pool + (tl.load(table + item) * KV_HEADS + head) * (PAGE_SIZE * HEAD_DIM)
        for first in tl.range(0, PAGE_SIZE, BLOCK_N, num_stages=3):
            top = tl.maximum(top, tl.load(keys + first * HEAD_DIM + at).to(tl.float32))
            top = tl.maximum(top, tl.load(keys + part_stride + first * HEAD_DIM + at).to(tl.float32))
    tl.store(out + head * tl.num_programs(1) + tl.program_id(1), tl.max(top))


def read_pages(pool: Tensor, table: Tensor, num_programs: int) -> Tensor:
    """Reads all keys and values of the pages in `table` once, as decode does, and computes next to nothing: the largest
    number that each program sees, fp32 `[K, num_programs]`. What this takes, decode takes at least.

    Shapes: pool `[2, pages, K, S, D]`, contiguous from its pages on; table int64 `[entries]`, of slots. The programs of
    a KV head take turns at the entries.
    """
    _, _, kv_heads, page_size, head_dim = pool.shape
    out = torch.empty(kv_heads, num_programs, device=pool.device)
    _read_pages[(kv_heads, num_programs)](
        pool, table, out, pool.stride(0), len(table), KV_HEADS=kv_heads, PAGE_SIZE=page_size, HEAD_DIM=head_dim,
        BLOCK_N=min(READ_TOKENS, page_size), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def merge_alone(attention: CudaAttention, q: Tensor) -> Tensor:
    """Merges states of a step of decode alone that nobody has computed: only the time that it takes means anything, and
    in decode it finds in the cache what the splits have just written."""
    shape, out = attention.shape, q.new_empty(q.shape)
    [plan], [arrays] = attention.plan.decode, attention.arrays.decode
    carry = carry_like(out) if len(plan.rounds) > 1 else None
    for one, read in zip(plan.rounds, arrays.rounds, strict=True):
        states = new_states(q, (one.num_states, shape.num_kv_heads, shape.group_size), shape.head_dim)
        merge_splits(states, read.sequences, out, carry, num_tokens=1, split_tokens=shape.split_tokens)
    return out


def splits_alone(*arguments: Any, **options: Any) -> None:
    """In the place of `merge_splits`."""
