"""The state of some query rows over one split of a sequence's keys: what decode computes, and prefill where it has to
agree with decode in every bit."""

import triton
import triton.language as tl

from distkv.kernels.cuda.paging import load_tile, tile_pages
from distkv.kernels.cuda.softmax import TileShape, add_tile

SPLIT_TILES = {2: TileShape(64, 64, 4), 4: TileShape(32, 32, 8)}
"""By bytes of a number, the tile of decode and prefill alike, so that both are the same instructions in the same
layout. 64 rows are one instruction of Hopper's tensor cores. Decode, which memory bounds, leaves most of them empty;
prefill has half as many to meet each key that is read as it likes best."""
NUM_STAGES = 3
"""Two tiles of keys and values are on their way. With 64 keys of head_dim 128 in 16 bits those take 64 KiB of shared
memory, so that three programs fit on an SM of an H100; its bandwidth and latency ask for about 40 KiB under way. A
split of 256 tokens is four such tiles."""


@triton.jit
def split_state(
    queries,
    entries,
    keys_at,
    values_at,
    own,
    head,
    start,
    end,
    limit,
    CODEC: tl.constexpr,
    CODED_GROUP: tl.constexpr,
    CODED_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`(m, total, acc)` of `queries [BLOCK_M, BLOCK_D]` over the keys `start .. end` of a sequence, of which a row sees
    those before `limit [BLOCK_M]`; of a row that sees none m is -inf and the sums are 0. `entries` are as for
    `paging.tile_pages`, `keys_at`, `values_at`, `own` and `head` as for `paging.load_tile`. Nothing else in the pages
    is read."""
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * 1.4426950408889634  # softmax in powers of two
    dim = tl.arange(0, BLOCK_D)
    fits = dim < HEAD_DIM
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    pages = tile_pages(entries, start, end, PAGE_SIZE, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        here = pages
        pages = tile_pages(entries, first + BLOCK_N, end, PAGE_SIZE, BLOCK_N)  # a tile ahead, so that no load waits
        key = first + tl.arange(0, BLOCK_N)
        filled = key < end
        keys = load_tile(
            here, keys_at, own, head, first, filled[:, None] & fits, False, CODEC, CODED_GROUP, CODED_ROW, KV_HEADS,
            PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(queries, keys.T, input_precision="ieee")
        scores = tl.where(key < limit[:, None], scores, -float("inf"))
        values = load_tile(
            here, values_at, own, head, first, filled[:, None] & fits, True, CODEC, CODED_GROUP, CODED_ROW, KV_HEADS,
            PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        m, total, acc = add_tile(scores, values, m, total, acc, SCALE)
    return m, total, acc
