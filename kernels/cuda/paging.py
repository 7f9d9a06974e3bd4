"""Where keys and values lie: what the attention kernels share of reading pages through a table.

A page's slice of one layer is `[K, S, D]` for keys and the same for values. In the device pool the values of all pages
follow the keys of all pages; in the staging buffer they follow the keys of the same page. With a codec that has codes,
and a second buffer holds some pages as they are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat, group_size
from distkv.kernels.cuda.codecs import INT4, decode_keys, decode_values, load_codes


@triton.jit
def buffer_index(entry):
    """As `page_entries.buffer_index`."""
    return -1 - entry


@triton.jit
def tile_pages(entries, first, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The table's entries of keys `first .. first + BLOCK_N` of a sequence, 0 at and beyond key `end`.

    `entries` points at the sequence's part of the table, `first` is a multiple of BLOCK_N or of PAGE_SIZE, whichever is
    smaller. One entry where a page holds the tile whole, else `[BLOCK_N]`.
    """
    if PAGE_SIZE >= BLOCK_N:
        return tl.load(entries + first // PAGE_SIZE, mask=first < end, other=0)
    else:
        rows = first + tl.arange(0, BLOCK_N)
        return tl.load(entries + rows // PAGE_SIZE, mask=rows < end, other=0)


@triton.jit
def tile_rows(
    pages,
    pool,
    buffer,
    head,
    first,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pointers `[BLOCK_N]` to the rows of keys `first ..` in the `pages` of `tile_pages`, or to those of values.

    `pool` and `buffer` point at the keys of their first page, or at its values. Only what crosses pages is computed in
    64 bits.
    """
    PAGE: tl.constexpr = KV_HEADS * PAGE_SIZE * HEAD_DIM
    # a page begins at 16 bytes in the pool and in the buffer; the compiler does not see it through a choice per row
    start = tl.multiple_of(tl.where(pages >= 0, pool + pages * PAGE, buffer + buffer_index(pages) * (2 * PAGE)), 16)
    if PAGE_SIZE >= BLOCK_N:  # a sum of what is one for the tile and what is the same for all tiles
        return start + (head * PAGE_SIZE + (first & (PAGE_SIZE - 1))) * HEAD_DIM + tl.arange(0, BLOCK_N) * HEAD_DIM
    else:
        return start + (head * PAGE_SIZE + ((first + tl.arange(0, BLOCK_N)) & (PAGE_SIZE - 1))) * HEAD_DIM


@triton.jit
def keys_and_values(
    pool, buffer, codes, scales, part_stride, CODEC: tl.constexpr, CODED_ROW: tl.constexpr, KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Where the keys of all pages begin, and where the values do, each as `load_tile` takes it."""
    PART: tl.constexpr = KV_HEADS * PAGE_SIZE * HEAD_DIM
    if CODEC == 0:
        return (pool, buffer), (pool + part_stride, buffer + PART)
    else:
        CODED: tl.constexpr = KV_HEADS * PAGE_SIZE * CODED_ROW
        ITEM: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
        values = pool + part_stride, buffer + PART, codes + CODED, scales + CODED // ITEM
        return (pool, buffer, codes, scales), values


@triton.jit
def load_tile(
    pages, places, own, head, first, fits, VALUES: tl.constexpr, CODEC: tl.constexpr, CODED_GROUP: tl.constexpr,
    CODED_ROW: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys, or values, `[BLOCK_N, BLOCK_D]` of tokens `first ..` in the `pages` of `tile_pages`, 0 where not `fits`.

    With a codec, those of keys `own[1] ..` lie as they are in page `own[0]` of the buffer, unless that is negative;
    those of pages with an entry below 0 are decoded.
    """
    dim = tl.arange(0, BLOCK_D)
    if CODEC == 0:
        rows = tile_rows(pages, places[0], places[1], head, first, KV_HEADS, PAGE_SIZE, HEAD_DIM, BLOCK_N)
        return tl.load(rows[:, None] + dim, mask=fits, other=0.0)
    else:
        CODES: tl.constexpr = HEAD_DIM // 2 if CODEC == INT4 else HEAD_DIM  # bytes of a token
        ITEM: tl.constexpr = places[0].dtype.element_ty.primitive_bitwidth // 8
        block = (tl.where(pages < 0, buffer_index(pages), 0) * (2 * KV_HEADS) + head) * (PAGE_SIZE * CODED_ROW)
        key = first + tl.arange(0, BLOCK_N)
        token = (key & (PAGE_SIZE - 1))[:, None]
        is_own = (own[0] >= 0) & ((first if PAGE_SIZE >= BLOCK_N else key) >= own[1])
        rows = tile_rows(
            tl.where(is_own, -1 - own[0], pages), places[0], places[1], head, first, KV_HEADS, PAGE_SIZE, HEAD_DIM,
            BLOCK_N,
        )  # fmt: skip
        if PAGE_SIZE >= BLOCK_N:
            pages += tl.zeros([1, 1], tl.int64)  # a tensor as the other masks are
        else:
            pages, block = pages[:, None], block[:, None]
        is_coded = pages < 0
        numbers = tl.load(rows[:, None] + dim, mask=fits & (pages >= 0), other=0.0)
        stored = load_codes(
            places[2] + block, token, is_coded, VALUES, BLOCK_D, CODED_GROUP, PAGE_SIZE, HEAD_DIM, CODEC
        )
        scales = places[3] + (block + PAGE_SIZE * CODES) // ITEM
        if VALUES:
            decoded = decode_values(
                stored, scales, token, is_coded, BLOCK_N, BLOCK_D, CODED_GROUP, PAGE_SIZE, HEAD_DIM, CODEC
            )
        elif CODED_GROUP >= BLOCK_N:  # one for all rows
            group = (first & (PAGE_SIZE - 1)) // CODED_GROUP
            decoded = decode_keys(stored, scales, group, is_coded, BLOCK_D, HEAD_DIM, CODEC)
        else:
            decoded = decode_keys(stored, scales, token // CODED_GROUP, is_coded, BLOCK_D, HEAD_DIM, CODEC)
        return tl.where(is_coded, decoded.to(numbers.dtype), numbers)


class Sources(NamedTuple):
    """Where pages lie, as kernels are given it: the pool's layer, a buffer of pages as they are, and one of codes with
    its scales as numbers of the pool's dtype, None without a codec."""

    pool: Tensor
    buffer: Tensor
    codes: Tensor | None
    scales: Tensor | None


def sources_of(layer_pool: Tensor, buffer: Tensor | None, codec: CodecFormat | None, exact: Tensor | None) -> Sources:
    """What kernels read pages from. Raises ValueError unless these are laid out as they read them.

    Shapes:
        layer_pool `[2, pages, K, S, D]`: a layer's view of a larger pool or not
        buffer: of a load, `[buffer_pages, 2, K, S, D]`, or with a codec uint8 `[buffer_pages, 2, K, S, R]`
        exact `[n, 2, K, S, D]`: with a codec, what the pages that the step fills held before they were rounded
    """
    _, _, kv_heads, page_size, head_dim = layer_pool.shape
    page = kv_heads * page_size * head_dim
    if layer_pool.stride()[1:] != (page, page_size * head_dim, head_dim, 1):
        raise ValueError(
            f"a layer of the pool must be contiguous from its pages on; its strides are {layer_pool.stride()}"
        )
    last = head_dim if codec is None else codec.row_bytes(page_size, head_dim, layer_pool.element_size())
    if buffer is not None and not (buffer.is_contiguous() and buffer.shape[1:] == (2, kv_heads, page_size, last)):
        raise ValueError(
            f"the buffer must be contiguous [places, 2, K, S, {last}] of the pool's pages, not {buffer.shape}"
        )
    if codec is None:
        return Sources(layer_pool, layer_pool if buffer is None else buffer, None, None)
    codes = layer_pool.view(torch.uint8) if buffer is None else buffer
    return Sources(layer_pool, layer_pool if exact is None else exact, codes, codes.view(layer_pool.dtype))


def codec_constants(layer_pool: Tensor, codec: CodecFormat | None) -> dict[str, int]:
    """What attention kernels are compiled for."""
    if codec is None:
        return {"CODEC": 0, "CODED_GROUP": 0, "CODED_ROW": 0}
    page_size, head_dim = layer_pool.shape[3:]
    row = codec.row_bytes(page_size, head_dim, layer_pool.element_size())
    return {"CODEC": codec.number, "CODED_GROUP": group_size(page_size, head_dim), "CODED_ROW": row}


def block_head_dim(head_dim: int) -> int:
    """Columns of a tile: head dim, padded to a power of two for a dot; what is added is never read from memory.

    Two dots of 64 + 16 or 64 + 32 columns would do less work for 80 and 96, but on Hopper the compiler then waits for
    each tensor-core instruction before the next, and decode is bound by memory either way.
    """
    return max(16, triton.next_power_of_2(head_dim))
