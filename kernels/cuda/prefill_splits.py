"""Prefill attention whose rows have the bits of decode: the states of the same splits, by the same instructions, added
to one another in the same order.

`prefill.py` is faster. It has one state for a whole walk, and a tile of twice as many rows.

Dims: T tokens, H query heads, K KV heads, G = H / K, S page_size, D head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.cuda.paging import block_head_dim, codec_constants, keys_and_values, sources_of
from distkv.kernels.cuda.prefill import BLOCK_M
from distkv.kernels.cuda.softmax import States, add_state
from distkv.kernels.cuda.split import NUM_STAGES, SPLIT_TILES, split_state


@triton.jit
def _prefill_splits_kernel(
    q,
    pool,
    buffer,
    codes,
    scales,
    table,
    chunks,
    blocks,
    saved_acc,
    saved_m,
    saved_total,
    out,
    q_stride: tl.int64,
    out_stride: tl.int64,
    part_stride: tl.int64,
    split_tokens: tl.int32,
    CODEC: tl.constexpr,
    CODED_GROUP: tl.constexpr,
    CODED_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    # the last block of a chunk walks furthest: those are taken first, so that no long one is left at the end
    block = blocks + 2 * (tl.num_programs(0) - 1 - tl.program_id(0))
    head = tl.program_id(1)
    keys_at, values_at = keys_and_values(
        pool, buffer, codes, scales, part_stride, CODEC, CODED_ROW, KV_HEADS, PAGE_SIZE, HEAD_DIM
    )
    chunk = chunks + 8 * tl.load(block)
    first_row = tl.load(block + 1).to(tl.int32) + tl.program_id(2) * BLOCK_M
    num_tokens, position = tl.load(chunk + 1).to(tl.int32), tl.load(chunk + 2).to(tl.int32)
    entries = table + tl.load(chunk + 3)
    start, end = tl.load(chunk + 4).to(tl.int32), tl.load(chunk + 5).to(tl.int32)
    own = tl.load(chunk + 7), position & -PAGE_SIZE

    # row token * G + g is query head k * G + g of the token
    row = first_row + tl.arange(0, BLOCK_M)
    real = row < num_tokens * GROUP
    token, query_head = row // GROUP, head * GROUP + row % GROUP
    dim = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (dim < HEAD_DIM)
    q_row = q + (tl.load(chunk) + token) * q_stride + query_head * HEAD_DIM
    queries = tl.load(q_row[:, None] + dim, mask=inside, other=0.0)

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    if start > 0:
        saved_row = (tl.load(chunk + 6) + token) * HEADS + query_head
        m = tl.load(saved_m + saved_row, mask=real, other=0.0)
        total = tl.load(saved_total + saved_row, mask=real, other=1.0)
        acc = tl.load(saved_acc + saved_row[:, None] * HEAD_DIM + dim, mask=inside, other=0.0)

    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_tokens - 1)
    finish = tl.minimum(position + last_token + 1, end)  # keys that the block sees end here
    for first in range(start, finish, split_tokens):
        # a row's number is read once more, see below
        row = tl.load(block + 1, volatile=True).to(tl.int32) + tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        limit = tl.load(chunk + 2).to(tl.int32) + row // GROUP + 1
        split_m, split_total, split_acc = split_state(
            queries, entries, keys_at, values_at, own, head, first, tl.minimum(first + split_tokens, finish), limit,
            CODEC, CODED_GROUP, CODED_ROW, KV_HEADS, PAGE_SIZE, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        m, total, acc = add_state(m, total, acc, split_m, split_total, split_acc)

    # Where things go is found out once more: `volatile` keeps the compiler from holding what was known above in
    # registers, of which the walk leaves none over.
    chunk = chunks + 8 * tl.load(block, volatile=True)
    row = tl.load(block + 1, volatile=True).to(tl.int32) + tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    num_tokens = tl.load(chunk + 1).to(tl.int32)
    real = row < num_tokens * GROUP
    token, query_head = row // GROUP, head * GROUP + row % GROUP
    inside = real[:, None] & (dim < HEAD_DIM)
    if tl.load(chunk + 5) < tl.load(chunk + 2) + num_tokens:
        saved_row = (tl.load(chunk + 6) + token) * HEADS + query_head
        tl.store(saved_m + saved_row, m, mask=real)
        tl.store(saved_total + saved_row, total, mask=real)
        tl.store(saved_acc + saved_row[:, None] * HEAD_DIM + dim, acc, mask=inside)
    else:
        out_row = out + (tl.load(chunk) + token) * out_stride + query_head * HEAD_DIM
        tl.store(out_row[:, None] + dim, acc / total[:, None], mask=inside)


def prefill_splits(
    q: Tensor,
    layer_pool: Tensor,
    buffer: Tensor | None,
    table: Tensor,
    chunks: Tensor,
    blocks: Tensor,
    state: States | None,
    out: Tensor,
    *,
    split_tokens: int,
    codec: CodecFormat | None = None,
    exact: Tensor | None = None,
) -> None:
    """As `prefill.prefill_walk`, with the bits of `decode.decode_splits` that is `batch_invariant` and has splits of
    `split_tokens` keys, followed by `merge.merge_splits`.

    `split_tokens` is a multiple of 64 and of the page size; walks are cut at multiples of it. Nothing beyond the keys
    of a chunk is read.
    """
    _, _, kv_heads, page_size, head_dim = layer_pool.shape
    sources = sources_of(layer_pool, buffer, codec, exact)
    if not len(blocks):
        return
    if state is None:
        nothing = torch.empty(0, dtype=torch.float32, device=q.device)
        state = States(nothing, nothing, nothing)
    tile = SPLIT_TILES[q.element_size()]
    _prefill_splits_kernel[(len(blocks), kv_heads, BLOCK_M // tile.rows)](
        q,
        *sources,
        table,
        chunks,
        blocks,
        *state,
        out,
        q.stride(0),
        out.stride(0),
        layer_pool.stride(0),
        split_tokens,
        **codec_constants(layer_pool, codec),
        GROUP=q.shape[1] // kv_heads,
        KV_HEADS=kv_heads,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=block_head_dim(head_dim),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=NUM_STAGES,
        enable_fp_fusion=codec is None,
    )
