"""Partial softmax states of attention over single pages, and their merge, see `page_states.hpp`: for pages that several
ranks, or a device and its host, share out. Merged in logical order they give the bits of `attend_pages`."""

import torch
from torch import Tensor

from distkv.kernels.native.library import DTYPES, Library
from distkv.kernels.native.paged_attention import LANES, CodedPages, read_arguments

ITEM_COLUMNS = 7
MOST_ROWS = 8  # of an item


def state_width(head_dim: int) -> int:
    """Numbers of the state of a row and a head: the sum of values, not yet divided by that of their weights, up to
    whole vectors; the highest score, as a power of 2; the sum of weights, 0 where the row has seen no key."""
    return -(-head_dim // LANES) * LANES + 2


def page_states(
    library: Library,
    q: Tensor,
    layer_pool: Tensor,
    buffer: Tensor | None,
    items: Tensor,
    states: Tensor,
    coded: CodedPages | None = None,
) -> None:
    """Writes the states of some rows over one page each.

    Shapes:
        q `[T, H, D]`, rows may lie apart
        layer_pool `[2, pages, K, S, D]`; buffer `[pages, 2, K, S, D]`, None when no entry lies in one, whose pages may
            lie apart, so that a layer of the host's pool is one; of codes uint8
            `[pages, 2, K, S, CodecFormat.row_bytes]`
        items int64 `[N, 7]`, by columns: the first row of q, the number of rows (at most MOST_ROWS), the position of
            the first, the page, counted from the sequence's first one, its entry (`page_entries.py`), its index in
            `coded.exact` or -1, and the first of its rows of states. A row sees keys of the page up to its position
        states fp32 `[R, H, state_width(D)]`
    """
    assert items.is_contiguous() and items.shape[1] == ITEM_COLUMNS
    assert states.is_contiguous() and states.shape[1:] == (q.shape[1], state_width(q.shape[2]))
    library.page_states(
        *read_arguments(q, layer_pool, buffer, coded), items.data_ptr(), len(items), states.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def merge_page_states(
    library: Library, states: Tensor, order: Tensor, offsets: Tensor, out: Tensor, targets: Tensor | None = None
) -> None:
    """Attention of rows from their states over all their pages, all of them together in as many calls as need be.

    Shapes:
        states fp32 `[R, H, state_width(D)]`, of `page_states`
        order int64: rows of states, for each row those of its pages in logical order, one row after the other; offsets
            int64 `[rows + 1]`: where they begin and end
        out `[T, H * D]`
        targets int64 `[rows]`: the row of out that gets what comes of each; or -1 - r for row r of the states, which
            becomes the state over all these pages, and comes first among those of its row in a later call. None for the
            rows of out one after the other
    """
    _, heads, _ = states.shape
    width = out.shape[1]
    targets = torch.arange(len(out)) if targets is None else targets
    assert states.is_contiguous() and out.is_contiguous() and states.shape[2] == state_width(width // heads)
    assert order.dtype == offsets.dtype == targets.dtype == torch.int64 and len(offsets) == len(targets) + 1
    library.merge_page_states(
        DTYPES[out.dtype], states.data_ptr(), heads, width // heads, order.data_ptr(), offsets.data_ptr(),
        targets.data_ptr(), len(targets), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
