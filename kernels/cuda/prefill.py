"""Paged prefill attention: causal attention of chunks of prompts over all their pages, in one walk or in several.

The online softmax of FlashAttention-2 (https://arxiv.org/abs/2307.08691), with the scores of the next tile under way
during the softmax of this one as in FlashAttention-3 (https://arxiv.org/abs/2407.08608). A program takes one block of
query rows of a KV head and walks over the keys in tiles of a fixed grid. Its state can be saved between two tiles and
taken up again, so that a prefix of which a part is streamed is walked in logical order, piece by piece, with bitwise
the same result.
The work is bound by the tensor cores.

Dims: T tokens, H query heads, K KV heads, G = H / K, S page_size, D head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.cuda.paging import (
    block_head_dim,
    codec_constants,
    keys_and_values,
    load_tile,
    sources_of,
    tile_pages,
)
from distkv.kernels.cuda.softmax import States, TileShape, add_tile

BLOCK_M = 128
"""Rows of a block, of which a chunk has `num_tokens * G` for each KV head."""
SEGMENT_TOKENS = 128
"""A walk may be cut at multiples of so many keys, and every tile is a divisor of it."""


@triton.jit
def _prefill_kernel(
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
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * 1.4426950408889634  # softmax in powers of two
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

    # The first keys are asked for before the queries: a program has its SM to itself, so nothing hides its beginning
    dim = tl.arange(0, BLOCK_D)
    fits = dim < HEAD_DIM
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_tokens - 1)
    finish = tl.minimum(position + last_token + 1, end)  # keys that the block sees end here
    value_pages = tile_pages(entries, start, finish, PAGE_SIZE, BLOCK_N)
    keys = load_tile(
        value_pages, keys_at, own, head, start, fits, False, CODEC, CODED_GROUP, CODED_ROW, KV_HEADS, PAGE_SIZE,
        HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # row token * G + g is query head k * G + g of the token
    row = first_row + tl.arange(0, BLOCK_M)
    real = row < num_tokens * GROUP
    token, query_head = row // GROUP, head * GROUP + row % GROUP
    q_row = q + (tl.load(chunk) + token) * q_stride + query_head * HEAD_DIM
    queries = tl.load(q_row[:, None] + dim, mask=real[:, None] & fits, other=0.0)

    # Whether a segment begins with a state, and ends with one, are choices at run time, so that there is one binary
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    if start > 0:
        saved_row = (tl.load(chunk + 6) + token) * HEADS + query_head
        m = tl.load(saved_m + saved_row, mask=real, other=0.0)
        total = tl.load(saved_total + saved_row, mask=real, other=1.0)
        acc_row = saved_acc + saved_row * HEAD_DIM
        acc = tl.load(acc_row[:, None] + dim, mask=real[:, None] & fits, other=0.0)

    scores = tl.dot(queries, keys.T, input_precision="ieee")
    key_pages = tile_pages(entries, start + BLOCK_N, finish, PAGE_SIZE, BLOCK_N)

    # Tiles that all rows see whole, then those on the diagonal; which is which follows from the block alone, not from
    # the segment. Rows of a tile that hold no key yet are read, being finite, and masked. Every row sees key 0, in the
    # first tile.
    diagonal = (position + first_row // GROUP + 1) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        if MASKED:
            begin, stop = tl.maximum(start, diagonal), finish
            # a row's number is read once more, see below
            row = tl.load(block + 1, volatile=True).to(tl.int32) + tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
            newest = tl.load(chunk + 2).to(tl.int32) + row // GROUP
        else:
            begin, stop = start, tl.minimum(diagonal, finish)
        for first in range(begin, stop, BLOCK_N):
            following = first + BLOCK_N
            of_keys, of_values = key_pages, value_pages
            # one tile ahead, each by a load of its own: the compiler pipelines no value that is carried over two tiles
            key_pages = tile_pages(entries, following + BLOCK_N, finish, PAGE_SIZE, BLOCK_N)
            value_pages = tile_pages(entries, following, finish, PAGE_SIZE, BLOCK_N)
            keys = load_tile(
                of_keys, keys_at, own, head, following, fits, False, CODEC, CODED_GROUP, CODED_ROW, KV_HEADS, PAGE_SIZE,
                HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            next_scores = tl.dot(queries, keys.T, input_precision="ieee")
            if MASKED:
                key = first + tl.arange(0, BLOCK_N)
                scores = tl.where(key <= newest[:, None], scores, -float("inf"))
            values = load_tile(
                of_values, values_at, own, head, first, fits, True, CODEC, CODED_GROUP, CODED_ROW, KV_HEADS, PAGE_SIZE,
                HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            m, total, acc = add_tile(scores, values, m, total, acc, SCALE)
            scores = next_scores

    # Where things go is found out once more: `volatile` keeps the compiler from holding what was known above in
    # registers, of which the walk leaves none over.
    chunk = chunks + 8 * tl.load(block, volatile=True)
    row = tl.load(block + 1, volatile=True).to(tl.int32) + tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    num_tokens = tl.load(chunk + 1).to(tl.int32)
    real = row < num_tokens * GROUP
    token, query_head = row // GROUP, head * GROUP + row % GROUP
    if tl.load(chunk + 5) < tl.load(chunk + 2) + num_tokens:
        saved_row = (tl.load(chunk + 6) + token) * HEADS + query_head
        tl.store(saved_m + saved_row, m, mask=real)
        tl.store(saved_total + saved_row, total, mask=real)
        acc_row = saved_acc + saved_row * HEAD_DIM
        tl.store(acc_row[:, None] + dim, acc, mask=real[:, None] & fits)
    else:
        out_row = out + (tl.load(chunk) + token) * out_stride + query_head * HEAD_DIM
        tl.store(out_row[:, None] + dim, acc / total[:, None], mask=real[:, None] & fits)


def prefill_tile(dtype_bytes: int) -> TileShape:
    """The tile by the width of a number; its rows divide BLOCK_M.

    In 16 bits: 128 rows are two warpgroups of an H100, each key that is read meets so many that the L2 cache keeps up,
    and with tiles of 64 keys the accumulator, two tiles of scores and the weights just fit into registers.
    In 32 bits there are no tensor cores, and operands lie in registers: small tiles, for exactness rather than speed.
    """
    return TileShape(32, 32, 8) if dtype_bytes == 4 else TileShape(BLOCK_M, 64, 8)


def prefill_walk(
    q: Tensor,
    layer_pool: Tensor,
    buffer: Tensor | None,
    table: Tensor,
    chunks: Tensor,
    blocks: Tensor,
    state: States | None,
    out: Tensor,
    *,
    codec: CodecFormat | None = None,
    exact: Tensor | None = None,
) -> None:
    """Walks each chunk's queries over one segment of their keys; those of the chunk itself are read from its pages too.

    Shapes, index tensors int64, all on the device:
        q `[T, H, D]`: rotated queries, of any row stride
        layer_pool, buffer, table: as for `decode.decode_splits`; the whole pool and all pages that are read are finite,
            what holds no token included
        chunks `[C, 8]`: first row of q and out, number of tokens, position of the first one, first entry of the table,
            first key and end key of the segment, first row of the state; with a codec the index in `exact` of the page
            that holds the chunk, -1 where it is read from the pool, else anything
        blocks `[N, 2]`: chunk and first row of each block of BLOCK_M rows, where row `token * G + g` of KV head k is
            query head `k * G + g`; a chunk's blocks in ascending order
        state `[tokens, H]`: of all tokens that are between two segments; None when each segment is a whole walk
        out `[T, H, D]`: of any row stride
        exact: see `paging.sources_of`; a chunk's tokens are of one page then
    A segment whose first key is not 0 goes on from the state. One that ends before the last token's key saves it, else
    its rows of `out` are written. A walk is cut at multiples of SEGMENT_TOKENS keys. However it is cut, and wherever
    the pages lie, the bits of `out` are the same.
    """
    _, _, kv_heads, page_size, head_dim = layer_pool.shape
    sources = sources_of(layer_pool, buffer, codec, exact)
    if not len(blocks):
        return
    if state is None:
        nothing = torch.empty(0, dtype=torch.float32, device=q.device)
        state = States(nothing, nothing, nothing)
    tile = prefill_tile(q.element_size())
    _prefill_kernel[(len(blocks), kv_heads, BLOCK_M // tile.rows)](
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
        **codec_constants(layer_pool, codec),
        GROUP=q.shape[1] // kv_heads,
        KV_HEADS=kv_heads,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=block_head_dim(head_dim),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=2 if q.element_size() == 4 else 3,
        enable_fp_fusion=codec is None,
    )
