"""Exact attention over pages, see `attention.hpp`: a token's bits depend on nothing but its sequence up to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.native.library import DTYPES, Library

LANES = 16  # of `simd.hpp`
WANTED = 6  # the column of `Chunks.numbers` that says whether the result is wanted


@dataclass(frozen=True)
class Chunks:
    """New tokens of some sequences, and which of their pages they meet in a call.

    Shapes: `numbers` int64 `[chunks, 8]`, by columns: the first row of q, the number of rows, the position of the
    first, the first entry of the table, the first page and the end of those that it meets, whether the result is
    wanted after them, and where the page of its own tokens lies in `CodedPages.exact`, -1 where the table says. Those
    of few tokens come first, `num_few` of them: their pages are shared out among the threads.
    """

    numbers: Tensor
    num_few: int


@dataclass(frozen=True)
class CodedPages:
    """Where pages in a buffer are codes: of which format, and what pages that were filled in this step held before
    they were rounded, `[pages, 2, K, S, D]`."""

    format: CodecFormat
    exact: Tensor


def kept_states(num_tokens: int, heads: int, head_dim: int) -> Tensor:
    """Memory for what is carried from one call to the next."""
    return torch.empty(num_tokens, heads, -(-head_dim // LANES) * LANES + 2, dtype=torch.float32, device="cpu")


def attend_pages(
    library: Library,
    q: Tensor,
    layer_pool: Tensor,
    buffer: Tensor | None,
    table: Tensor,
    chunks: Chunks,
    kept: Tensor | None,
    out: Tensor,
    coded: CodedPages | None = None,
    page_states: Tensor | None = None,
) -> None:
    """Attention of each chunk over some of its pages, which it must meet in logical order, all of them together in as
    many calls as need be.

    Shapes:
        q `[T, H, D]`, rows may lie apart; out `[T, H * D]`, written where the result of a chunk is wanted
        layer_pool `[2, pages, K, S, D]`; buffer `[pages, 2, K, S, D]`, None when no entry lies in one; of codes uint8
            `[pages, 2, K, S, CodecFormat.row_bytes]`
        table int64, see `page_entries.py`
        kept: of `kept_states`, None when all chunks meet all their pages in this call
        page_states: fp32 `[N, K, R, 2]` for N entries of the table, where the weights of pages are wanted: takes of
            each row of a KV head's queries, token after token, its state over the page, see `page_weights.py`. All
            chunks are to be of few tokens then, of no more rows than R
    """
    assert chunks.numbers.is_contiguous() and chunks.numbers.shape[1] == 8
    if page_states is not None:
        assert chunks.num_few == len(chunks.numbers) and page_states.is_contiguous()
        assert page_states.shape[:2] == (len(table), layer_pool.shape[2])
    library.attention(
        *read_arguments(q, layer_pool, buffer, coded), table.data_ptr(),
        chunks.numbers.data_ptr(), len(chunks.numbers), chunks.num_few, None if kept is None else kept.data_ptr(),
        None if page_states is None else page_states.data_ptr(), 0 if page_states is None else page_states.shape[2],
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def read_arguments(q: Tensor, layer_pool: Tensor, buffer: Tensor | None, coded: CodedPages | None) -> list[object]:
    """What the library is told of queries and of the pages that they may meet. Shapes as in `attend_pages`; pages of
    the buffer may lie apart."""
    _, heads, dim = q.shape
    assert q.stride(1) == dim and q.stride(2) == 1 and layer_pool.is_contiguous() and q.dtype == layer_pool.dtype
    _, num_slots, kv_heads, page_size, _ = layer_pool.shape
    codec, block, exact = 0, 0, None
    if coded is not None:
        codec, exact = coded.format.number, coded.exact.data_ptr()
        block = page_size * coded.format.row_bytes(page_size, dim, q.element_size())
    where, stride = None, 0
    if buffer is not None:
        assert buffer[0].is_contiguous()
        where, stride = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
    return [
        DTYPES[q.dtype], q.data_ptr(), q.stride(0), heads, kv_heads, dim, page_size, layer_pool.data_ptr(), num_slots,
        where, stride, codec, block, exact,
    ]  # fmt: skip
