"""Gather and scatter of KV pages by a kernel, which reads and writes pinned host memory directly."""

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
"""What a thread moves with one instruction."""
TILE_VECTORS = 1024
"""What a program of 8 warps moves at a time: 4 loads in flight for each thread, 16 KiB in all."""


def copy_pages(source: Tensor, target: Tensor, pairs: Tensor, num_programs: int) -> None:
    """`target[pairs[i, 1]] = source[pairs[i, 0]]` for all i, bit for bit.

    Either side may be pinned host memory. The targets differ from one another and from the sources.

    Shapes:
        source `[n, parts, block]`, target `[m, parts, block]` of one dtype: a page is `parts` blocks, of a multiple of
            16 bytes each; the strides of pages and parts are free multiples of 16 bytes, the last dim is contiguous
        pairs int64 `[k, 2]`, contiguous, on the device
        num_programs: how many programs share the work: it bounds the multiprocessors that the copy takes
    Raises ValueError for another layout.
    """
    # integers of 8 bytes: one binary for all dtypes, and a NaN keeps its bits
    source, target = source.view(torch.int64), target.view(torch.int64)
    words = VECTOR_BYTES // source.element_size()
    if source.shape[1:] != target.shape[1:] or not pairs.is_contiguous():
        raise ValueError(
            f"pages of {source.shape[1:]} and {target.shape[1:]} words differ, or pairs are not contiguous"
        )
    if any(size % words for size in (source.shape[2], *source.stride()[:2], *target.stride()[:2])):
        raise ValueError(
            f"blocks and their strides must be multiples of {VECTOR_BYTES} bytes; choose a larger page_size"
        )
    vectors = source.shape[2] // words
    total = pairs.shape[0] * source.shape[1] * triton.cdiv(vectors, TILE_VECTORS)
    if not total:
        return
    _copy_pages[(min(num_programs, total),)](
        source,
        target,
        pairs,
        total,
        vectors,
        source.shape[1],
        source.stride(0) // words,
        source.stride(1) // words,
        target.stride(0) // words,
        target.stride(1) // words,
        WORDS=words,
        TILE_VECTORS=TILE_VECTORS,
        num_warps=8,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["total"])  # it changes from call to call
def _copy_pages(
    source,
    target,
    pairs,
    total,
    vectors,
    parts,
    source_page,
    source_part,
    target_page,
    target_part,
    WORDS: tl.constexpr,
    TILE_VECTORS: tl.constexpr,
):
    """Sizes and strides count vectors, so that the compiler knows every address to be aligned to one."""
    tiles = tl.cdiv(vectors, TILE_VECTORS)
    for item in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0)):
        pair = item // (parts * tiles)
        part = item // tiles % parts
        word = (item % tiles) * (TILE_VECTORS * WORDS) + tl.arange(0, TILE_VECTORS * WORDS)
        inside = word < vectors * WORDS
        read = (tl.load(pairs + 2 * pair) * source_page + part * source_part) * WORDS
        written = (tl.load(pairs + 2 * pair + 1) * target_page + part * target_part) * WORDS
        tl.store(target + written + word, tl.load(source + read + word, mask=inside), mask=inside)
