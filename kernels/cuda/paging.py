"""Where keys and values lie: what the attention kernels share of reading pages through a table.

A page's slice of one layer is `[K, S, D]` for keys and the same for values. In the device pool the values of all pages
follow the keys of all pages; in the staging buffer they follow the keys of the same page.
"""

import triton
import triton.language as tl
from torch import Tensor


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


def check_layouts(layer_pool: Tensor, buffer: Tensor | None) -> None:
    """Raises ValueError unless pages are laid out as the kernels read them.

    Shapes: layer_pool `[2, pages, K, S, D]`, a layer's view of a larger pool or not; buffer
    `[buffer_pages, 2, K, S, D]`.
    """
    _, _, kv_heads, page_size, head_dim = layer_pool.shape
    page = kv_heads * page_size * head_dim
    if layer_pool.stride()[1:] != (page, page_size * head_dim, head_dim, 1):
        raise ValueError(
            f"a layer of the pool must be contiguous from its pages on; its strides are {layer_pool.stride()}"
        )
    if buffer is not None and not (buffer.is_contiguous() and buffer.shape[1:] == (2, *layer_pool.shape[2:])):
        raise ValueError(f"the buffer must be contiguous [places, 2, K, S, D] of the pool's pages, not {buffer.shape}")


def block_head_dim(head_dim: int) -> int:
    """Columns of a tile: head dim, padded to a power of two for a dot; what is added is never read from memory.

    Two dots of 64 + 16 or 64 + 32 columns would do less work for 80 and 96, but on Hopper the compiler then waits for
    each tensor-core instruction before the next, and decode is bound by memory either way.
    """
    return max(16, triton.next_power_of_2(head_dim))
