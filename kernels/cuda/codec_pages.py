"""Pages as codes by kernels, which read and write pinned host memory directly, see `codec_format.py`.

Dims: K KV heads, S page_size, D head_dim, R `CodecFormat.row_bytes`, G `group_size`. A program takes G tokens of a head
at a time, keys or values: of keys that is a group of each channel, of values some groups of each token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels import page_codec
from distkv.kernels.codec_format import CodecFormat, group_size
from distkv.kernels.cuda.codecs import (
    INT4,
    decode_groups,
    decode_keys,
    decode_values,
    encode_groups,
    load_codes,
    store_codes,
    store_ends,
)
from distkv.kernels.cuda.paging import block_head_dim


@dataclass(frozen=True)
class CudaCodec:
    """Encodes and decodes pages, bit for bit as `page_codec.py`; a `PageCodec` and a `RowCodec`.

    Shapes: pools are `[layers, 2, slots, K, S, D]` or one layer of that, K first, the last three dims contiguous; rows
    `[row, layers * 2, K * S * D]` or `[row, layers * 2, K * S * R]`, the last dim contiguous; codes are uint8.
    """

    format: CodecFormat
    num_kv_heads: int
    page_size: int
    head_dim: int

    def encode_rows(self, source: Tensor, target: Tensor, pairs: Tensor, num_programs: int) -> None:
        """`target[pairs[i, 1]]` becomes the codes of `source[pairs[i, 0]]` for all i; see `page_copy.copy_pages`."""
        self._run(_encode_rows, source, target, source.dtype, pairs, num_programs)

    def decode_rows(self, source: Tensor, target: Tensor, pairs: Tensor, num_programs: int) -> None:
        """The inverse."""
        self._run(_decode_rows, target, source, target.dtype, pairs, num_programs)

    def encode(self, pool: Tensor, slot: int, codes: Tensor) -> None:
        """Writes the page in a slot as codes `[layers, 2, K, S, R]`, which may lie in any memory: by torch's operators,
        for a page that goes alone."""
        codes.copy_(page_codec.encode(pool[:, :, slot], self.format))

    def decode(self, codes: Tensor, pool: Tensor, slot: int) -> None:
        """The inverse."""
        pool[:, :, slot] = page_codec.decode(codes.to(pool.device), self.format, pool.dtype, self.head_dim)

    def round(self, layer_pool: Tensor, slots: Tensor, exact: Tensor | None = None) -> None:
        """Gives the pages in some slots of a layer `[2, slots, K, S, D]` the values of their codes.

        Args:
            slots: int64 `[n]`, on the device; a negative one stands for none.
            exact: `[n, 2, K, S, D]`, contiguous, is given what they held before.
        """
        if not len(slots):
            return
        group = group_size(self.page_size, self.head_dim)
        _round_pages[(len(slots), self.page_size // group, 2 * self.num_kv_heads)](
            layer_pool,
            slots,
            exact,
            layer_pool.stride(0),
            layer_pool.stride(1),
            CODEC=self.format.number,
            GROUP=group,
            KV_HEADS=self.num_kv_heads,
            PAGE_SIZE=self.page_size,
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_head_dim(self.head_dim),
            num_warps=num_warps(group, self.head_dim),
            enable_fp_fusion=False,
        )

    def _run(
        self, kernel: triton.JITFunction, pages: Tensor, codes: Tensor, dtype: torch.dtype, pairs: Tensor,
        num_programs: int,
    ) -> None:  # fmt: skip
        group, scales = group_size(self.page_size, self.head_dim), codes.view(dtype)
        total = len(pairs) * pages.shape[1] * self.num_kv_heads * (self.page_size // group)
        if not total:
            return
        kernel[(min(num_programs, total),)](
            pages,
            codes,
            scales,
            pairs,
            total,
            pages.shape[1],
            *pages.stride()[:2],
            *codes.stride()[:2],
            *scales.stride()[:2],
            CODEC=self.format.number,
            GROUP=group,
            KV_HEADS=self.num_kv_heads,
            PAGE_SIZE=self.page_size,
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_head_dim(self.head_dim),
            ROW=self.format.row_bytes(self.page_size, self.head_dim, dtype.itemsize),
            num_warps=num_warps(group, self.head_dim),
            enable_fp_fusion=False,
        )


def num_warps(group: int, head_dim: int) -> int:
    """Of a program, so that the numbers of its tokens fit into registers."""
    return 8 if group * block_head_dim(head_dim) > 4096 else 4


@triton.jit
def _find(
    item, pages, codes, scales, pairs, parts, page_stride, page_part, codes_stride, codes_part, scales_stride,
    scales_part, FROM_PAGES: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Which tokens a program takes next: the tile, their numbers in the page `[GROUP, 1]`, whether it is of values, and
    where the head's numbers, codes and scales begin."""
    TILES: tl.constexpr = PAGE_SIZE // GROUP
    ITEM: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    CODES: tl.constexpr = PAGE_SIZE * (HEAD_DIM // 2 if CODEC == INT4 else HEAD_DIM)  # bytes
    tile, head = item % TILES, item // TILES % KV_HEADS
    part, pair = item // (TILES * KV_HEADS) % parts, item // (TILES * KV_HEADS) // parts
    page = tl.load(pairs + 2 * pair + (0 if FROM_PAGES else 1))
    coded = tl.load(pairs + 2 * pair + (1 if FROM_PAGES else 0))
    numbers = pages + page * page_stride + part * page_part + head * (PAGE_SIZE * HEAD_DIM)
    block = codes + coded * codes_stride + part * codes_part + head * (PAGE_SIZE * ROW)
    ends = scales + coded * scales_stride + part * scales_part + (head * (PAGE_SIZE * ROW) + CODES) // ITEM
    return tile, tile * GROUP + tl.arange(0, GROUP)[:, None], part % 2 == 1, numbers, block, ends


@triton.jit(do_not_specialize=["total"])  # it changes from call to call
def _encode_rows(
    pages, codes, scales, pairs, total, parts, page_stride, page_part, codes_stride, codes_part, scales_stride,
    scales_part, CODEC: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0)):
        tile, token, is_value, numbers, block, ends = _find(
            item, pages, codes, scales, pairs, parts, page_stride, page_part, codes_stride, codes_part, scales_stride,
            scales_part, True, CODEC, GROUP, KV_HEADS, PAGE_SIZE, HEAD_DIM, ROW,
        )  # fmt: skip
        x = tl.load(numbers + token * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        if is_value:
            _encode_values(x, block, ends, token, CODEC, GROUP, PAGE_SIZE, HEAD_DIM, BLOCK_D)
        else:
            _encode_keys(x, block, ends, tile, CODEC, GROUP, PAGE_SIZE, HEAD_DIM, BLOCK_D)


@triton.jit
def _encode_keys(
    x, codes, scales, tile, CODEC: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    stored, lowest, highest = encode_groups(x, 0, CODEC)
    row = tl.arange(0, BLOCK_D)[:, None]
    store_codes(codes, tl.trans(stored), row, tile * GROUP, row < HEAD_DIM, BLOCK_D, GROUP, GROUP, PAGE_SIZE, CODEC)
    dim = tl.arange(0, BLOCK_D)[None, :]
    NUM_SCALES: tl.constexpr = 2 if CODEC == INT4 else 1
    store_ends(scales + tile * (NUM_SCALES * HEAD_DIM) + dim, HEAD_DIM, lowest, highest, dim < HEAD_DIM, CODEC)


@triton.jit
def _encode_values(
    x, codes, scales, token, CODEC: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCK_G: tl.constexpr = BLOCK_D // GROUP
    stored, lowest, highest = encode_groups(tl.reshape(x, [GROUP, BLOCK_G, GROUP]), 2, CODEC)
    by_token = tl.reshape(stored, [GROUP, BLOCK_D])
    store_codes(codes, by_token, token, 0, token >= 0, GROUP, BLOCK_D, GROUP, HEAD_DIM, CODEC)
    group = tl.arange(0, BLOCK_G)
    lowest, highest = tl.reshape(lowest, [GROUP, BLOCK_G]), tl.reshape(highest, [GROUP, BLOCK_G])
    NUM_SCALES: tl.constexpr = 2 if CODEC == INT4 else 1
    first = scales + group * (NUM_SCALES * PAGE_SIZE) + token
    store_ends(first, PAGE_SIZE, lowest, highest, group < HEAD_DIM // GROUP, CODEC)


@triton.jit(do_not_specialize=["total"])  # it changes from call to call
def _decode_rows(
    pages, codes, scales, pairs, total, parts, page_stride, page_part, codes_stride, codes_part, scales_stride,
    scales_part, CODEC: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0)):
        tile, token, is_value, numbers, block, ends = _find(
            item, pages, codes, scales, pairs, parts, page_stride, page_part, codes_stride, codes_part, scales_stride,
            scales_part, False, CODEC, GROUP, KV_HEADS, PAGE_SIZE, HEAD_DIM, ROW,
        )  # fmt: skip
        if is_value:
            stored = load_codes(block, token, token >= 0, True, BLOCK_D, GROUP, PAGE_SIZE, HEAD_DIM, CODEC)
            found = decode_values(stored, ends, token, token >= 0, GROUP, BLOCK_D, GROUP, PAGE_SIZE, HEAD_DIM, CODEC)
        else:
            stored = load_codes(block, token, token >= 0, False, BLOCK_D, GROUP, PAGE_SIZE, HEAD_DIM, CODEC)
            found = decode_keys(stored, ends, tile, tl.zeros([1, 1], tl.int32) == 0, BLOCK_D, HEAD_DIM, CODEC)
        tl.store(numbers + token * HEAD_DIM + dim, found.to(pages.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _round_pages(
    pool, slots, exact, part_stride, page_stride, CODEC: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots + tl.program_id(0))
    if slot >= 0:
        part, head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
        dim = tl.arange(0, BLOCK_D)
        fits = dim < HEAD_DIM
        at = (tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]) * HEAD_DIM + dim
        own = pool + slot * page_stride + part.to(tl.int64) * part_stride + head * (PAGE_SIZE * HEAD_DIM) + at
        before = tl.load(own, mask=fits, other=0.0)
        if exact is not None:
            block = tl.program_id(0).to(tl.int64) * (2 * KV_HEADS) + tl.program_id(2)
            tl.store(exact + block * (PAGE_SIZE * HEAD_DIM) + at, before, mask=fits)
        x = before.to(tl.float32)
        numbers = _round_values(x, CODEC, GROUP, BLOCK_D) if part == 1 else _round_keys(x, CODEC)
        tl.store(own, numbers.to(pool.dtype.element_ty), mask=fits)


@triton.jit
def _round_keys(x, CODEC: tl.constexpr):
    stored, lowest, highest = encode_groups(x, 0, CODEC)
    return decode_groups(stored, lowest, highest, CODEC)


@triton.jit
def _round_values(x, CODEC: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    stored, lowest, highest = encode_groups(tl.reshape(x, [GROUP, BLOCK_D // GROUP, GROUP]), 2, CODEC)
    return tl.reshape(decode_groups(stored, lowest, highest, CODEC), [GROUP, BLOCK_D])
