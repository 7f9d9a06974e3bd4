"""Paged decode attention: the partial states of a few new tokens per sequence, one for each split of its pages.

Split-KV as in Flash-Decoding (https://pytorch.org/blog/flash-decoding/) with the online softmax of FlashAttention-2
(https://arxiv.org/abs/2307.08691). A program takes one KV head of one split and reads its keys and values once, for all
query heads of that KV head and all new tokens, packed into the rows of one tile (or of two, where they are too many for
the tile that prefill has as well). The work is bound by memory bandwidth.

Dims: B sequences, C new tokens per sequence, H query heads, K KV heads, G = H / K, S page_size, D head_dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.cuda.paging import block_head_dim, codec_constants, keys_and_values, sources_of
from distkv.kernels.cuda.softmax import States, TileShape
from distkv.kernels.cuda.split import NUM_STAGES, SPLIT_TILES, split_state


@triton.jit
def _decode_kernel(
    q,
    pool,
    buffer,
    codes,
    scales,
    table,
    sequences,
    items,
    num_items,
    states_acc,
    states_m,
    states_total,
    q_stride: tl.int64,
    part_stride: tl.int64,
    split_tokens: tl.int32,
    CODEC: tl.constexpr,
    CODED_GROUP: tl.constexpr,
    CODED_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ROWS: tl.constexpr = NUM_TOKENS * GROUP
    head = tl.program_id(0)
    keys_at, values_at = keys_and_values(
        pool, buffer, codes, scales, part_stride, CODEC, CODED_ROW, KV_HEADS, PAGE_SIZE, HEAD_DIM
    )
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < ROWS
    dim = tl.arange(0, BLOCK_D)
    fits = dim < HEAD_DIM

    for item in range(tl.program_id(1), tl.load(num_items).to(tl.int32), tl.num_programs(1)):
        sequence = sequences + 6 * tl.load(items + 2 * item)
        split = tl.load(items + 2 * item + 1)
        first_row, num_keys = tl.load(sequence), tl.load(sequence + 1).to(tl.int32)
        entries = table + tl.load(sequence + 2)
        state = tl.load(sequence + 3) + split
        start = split.to(tl.int32) * split_tokens
        end = tl.minimum(num_keys, start + split_tokens)
        limit = tl.minimum(num_keys - (NUM_TOKENS - 1) + row // GROUP, end)  # keys that a row sees end here

        # row c * G + g is query head k * G + g of token c
        q_row = q + (first_row + row // GROUP) * q_stride + (head * GROUP + row % GROUP) * HEAD_DIM
        queries = tl.load(q_row[:, None] + dim, mask=real[:, None] & fits, other=0.0)
        m, total, acc = split_state(
            queries, entries, keys_at, values_at, (-1, 0), head, start, end, limit, CODEC, CODED_GROUP, CODED_ROW,
            KV_HEADS, PAGE_SIZE, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        at = (state * KV_HEADS + head) * ROWS + row
        tl.store(states_acc + at[:, None] * HEAD_DIM + dim, acc, mask=real[:, None] & fits)
        tl.store(states_m + at, m, mask=real)
        tl.store(states_total + at, total, mask=real)


def decode_tile(dtype_bytes: int, rows: int, batch_invariant: bool) -> TileShape:
    """The tile for `rows` query rows of one KV head (tokens * group)."""
    if batch_invariant:
        return SPLIT_TILES[dtype_bytes]
    block_m = max(16, triton.next_power_of_2(rows))  # a dot takes at least 16 rows
    if dtype_bytes == 4:  # no tensor cores, and operands in registers
        return TileShape(block_m, 32 if block_m < 64 else 16, 4 if block_m < 32 else 8)
    return TileShape(block_m, 64, 4 if block_m < 32 else 8)


def decode_splits(
    q: Tensor,
    layer_pool: Tensor,
    buffer: Tensor | None,
    table: Tensor,
    sequences: Tensor,
    items: Tensor,
    num_items: Tensor,
    states: States,
    *,
    num_tokens: int,
    split_pages: int,
    num_programs: int,
    batch_invariant: bool,
    codec: CodecFormat | None = None,
) -> None:
    """Writes the states of the splits in `items`, see `merge.merge_splits` for what becomes of them.

    Shapes, index tensors int64, all on the device:
        q `[T, H, D]`: rotated queries, of any row stride
        layer_pool `[2, pages, K, S, D]`: a layer of the pool, contiguous from its pages on
        buffer: None where every page that is read is in the pool; else `[buffer_pages, 2, K, S, D]`, or with a codec
            pages as codes, see `paging.sources_of`
        table `[entries]`: where each page of each sequence lies, in logical order: >= 0 a slot of the pool, < 0 the
            `page_entries.buffer_entry` of the buffer
        sequences `[B, 6]`: first row of q, number of keys with the new ones (0 for padding), first entry of the table,
            state of split 0; the last two columns are for `merge.merge_splits`
        items `[N, 2]`: sequence and split; num_items `[1]`: how many of them count
        states `[states, K, C * G]`: row `c * G + g` is query head `k * G + g`
    `num_tokens` (C) new tokens of each sequence are causal among themselves. Split s of a sequence is its pages
    `s * split_pages ..`, as far as it has keys; its state is that of split 0 + s. A row that sees no key there gets
    m -inf and sums of 0. `num_programs` programs per KV head take turns at the items, so a captured launch serves any
    `num_items` up to N.

    The bits of a state depend on its queries, keys and values alone; nothing else in their pages is read. With
    `batch_invariant` they do not depend on C either, and are those of the same rows in `prefill_splits.prefill_splits`.
    """
    _, _, kv_heads, page_size, head_dim = layer_pool.shape
    sources = sources_of(layer_pool, buffer, codec, None)
    group = q.shape[1] // kv_heads
    tile = decode_tile(q.element_size(), num_tokens * group, batch_invariant)
    _decode_kernel[(kv_heads, num_programs, triton.cdiv(num_tokens * group, tile.rows))](
        q,
        *sources,
        table,
        sequences,
        items,
        num_items,
        *states,
        q.stride(0),
        layer_pool.stride(0),
        split_pages * page_size,
        **codec_constants(layer_pool, codec),
        GROUP=group,
        NUM_TOKENS=num_tokens,
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
