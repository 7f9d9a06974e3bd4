"""Linear layers on CUDA whose rows have the same bits however many there are.

The weight's rows are on the 64-row side of the tensor cores' instruction and the tokens on its narrow side, so it is
one instruction for one token and for thousands. Each element is a sum over K in one order: K is cut into segments, a
number that the shape of the weight alone decides, each of which is added up tile by tile, and the segments one after
the other. Few tokens leave room to have the segments side by side, so that enough programs read the weight: their sums
go through memory, and a second kernel adds them. Many tokens have them one after the other in the same program.

Dims: T tokens, K inputs, N outputs of the weight.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distkv.kernels.linear import Linear

HALF = 64
"""Outputs of a product, of which a program has two: neighbours, or a gate and what it lets through."""
PROGRAMS = 192
"""So many programs read a weight at least, if it has K enough: three for two multiprocessors of an H100."""
WORKSPACE_BYTES = 2**25
"""For segments side by side, at most: what steps of other sizes take is not tried at the start."""
SEGMENT_TILES = 4
"""Tiles of K that a segment has at least."""
FINISH_COLUMNS = 256
"""Outputs of a program that adds up segments."""


class LinearTile(NamedTuple):
    """How the work is cut up. The bits of an element follow from `depth` alone."""

    tokens: int
    depth: int  # elements of K
    num_warps: int
    num_stages: int


class Segments(NamedTuple):
    """How K is cut up."""

    number: int
    tiles: int  # of each but the last, which has what is left


def segments_of(outputs: int, depth: int, dtype_bytes: int) -> Segments:
    """The segments of a weight `[outputs, depth]`; its shape alone decides, since bits follow from it."""
    tiles = triton.cdiv(depth, tile_depth(dtype_bytes))
    programs = triton.cdiv(outputs, 2 * HALF)
    wanted = min(triton.cdiv(PROGRAMS, programs), max(1, tiles // SEGMENT_TILES))
    each = triton.cdiv(tiles, wanted)
    return Segments(triton.cdiv(tiles, each), each)


def tile_depth(dtype_bytes: int) -> int:
    """Elements of K in a tile: 128 bytes."""
    return 128 // dtype_bytes


def linear_tile(num_tokens: int, dtype_bytes: int, adds_segments: bool) -> LinearTile:
    """The tile for so many tokens.

    Few: four stages of 16 KiB of weights for each program, which are read at the rate of the memory. Many: 256 tokens
    meet each weight that is read, or 128 where sums of segments take as many registers once more.
    """
    depth = tile_depth(dtype_bytes)
    if dtype_bytes == 4:  # no tensor cores, and operands in registers
        return LinearTile(16, depth, 8, 2)
    if num_tokens <= 64:
        return LinearTile(max(16, triton.next_power_of_2(num_tokens)), depth, 4, 4)
    if num_tokens <= 128 or adds_segments:
        return LinearTile(128, depth, 8, 4)
    return LinearTile(256, depth, 8, 3)


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up`, fp32."""
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["num_tokens"])  # one binary for any number
def _linear_kernel(
    x,
    weight,
    bias,
    out,
    num_tokens,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_TILES: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tokens, outputs, segment where they are side by side): programs with the same weights are neighbours, so
    that they are read from memory once."""
    TILES: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS  # of the result
    APART: tl.constexpr = WIDTH if GATED else HALF  # from an output of the first half to its like in the second
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1) * (HALF if GATED else 2 * HALF) + tl.arange(0, HALF)
    # what lies beyond the borders is computed from what is there, and not stored
    x_row = x + tl.minimum(token, num_tokens - 1).to(tl.int64) * DEPTH
    first_row = weight + tl.minimum(output, OUTPUTS - 1).to(tl.int64) * DEPTH
    second_row = weight + tl.minimum(output + APART, OUTPUTS - 1).to(tl.int64) * DEPTH

    first_total = tl.zeros([HALF, BLOCK_T], tl.float32)
    second_total = tl.zeros([HALF, BLOCK_T], tl.float32)
    begin = tl.program_id(2) if SIDE_BY_SIDE else 0
    for segment in range(begin, begin + 1 if SIDE_BY_SIDE or SEGMENTS == 1 else SEGMENTS):
        first = tl.zeros([HALF, BLOCK_T], tl.float32)
        second = tl.zeros([HALF, BLOCK_T], tl.float32)
        start = segment * SEGMENT_TILES
        for tile in range(start, tl.minimum(start + SEGMENT_TILES, TILES)):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            if DEPTH % BLOCK_K == 0:
                tokens = tl.load(x_row[:, None] + k)
                first_weights = tl.load(first_row[:, None] + k)
                second_weights = tl.load(second_row[:, None] + k)
            else:
                inside = k < DEPTH
                tokens = tl.load(x_row[:, None] + k, mask=inside, other=0.0)
                first_weights = tl.load(first_row[:, None] + k, mask=inside, other=0.0)
                second_weights = tl.load(second_row[:, None] + k, mask=inside, other=0.0)
            first = tl.dot(first_weights, tokens.T, first, input_precision="ieee")
            second = tl.dot(second_weights, tokens.T, second, input_precision="ieee")
        first_total += first
        second_total += second

    if SIDE_BY_SIDE:  # the sums as they are, `[segments, T, N]`
        target = out + (tl.program_id(2) * num_tokens + token).to(tl.int64) * OUTPUTS
        there = (token < num_tokens)[:, None] & (output < WIDTH)
        tl.store(target[:, None] + output, first_total.T, mask=there)
        there = (token < num_tokens)[:, None] & (output + APART < OUTPUTS)
        tl.store(target[:, None] + output + APART, second_total.T, mask=there)
    else:
        if bias is not None:
            first_bias = tl.load(bias + output, mask=output < OUTPUTS, other=0.0)
            second_bias = tl.load(bias + output + APART, mask=output + APART < OUTPUTS, other=0.0)
            first_total += first_bias.to(tl.float32)[:, None]
            second_total += second_bias.to(tl.float32)[:, None]
        target = out + token.to(tl.int64) * WIDTH
        there = (token < num_tokens)[:, None] & (output < WIDTH)
        kind = out.dtype.element_ty
        if GATED:
            tl.store(target[:, None] + output, silu_times(first_total, second_total).to(kind).T, mask=there)
        else:
            tl.store(target[:, None] + output, first_total.to(kind).T, mask=there)
            there = (token < num_tokens)[:, None] & (output + APART < WIDTH)
            tl.store(target[:, None] + output + APART, second_total.to(kind).T, mask=there)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_segments(
    partial,
    bias,
    out,
    num_tokens,
    OUTPUTS: tl.constexpr,
    GATED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up what programs side by side have left, and ends as they would have."""
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    token = tl.program_id(0)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = output < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    up_total = tl.zeros([BLOCK], tl.float32)
    for segment in tl.static_range(SEGMENTS):
        source = partial + (segment * num_tokens + token).to(tl.int64) * OUTPUTS + output
        total += tl.load(source, mask=inside, other=0.0)
        if GATED:
            up_total += tl.load(source + WIDTH, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up_total += tl.load(bias + output + WIDTH, mask=inside, other=0.0).to(tl.float32)
    value = silu_times(total, up_total) if GATED else total
    tl.store(out + token.to(tl.int64) * WIDTH + output, value.to(out.dtype.element_ty), mask=inside)


def fixed_order_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """As `linear.plain_linear`; the bits of a row depend on the row alone. Its x must be contiguous."""
    return _make(weight, bias, gated=False)


def fixed_order_gated_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """As `token_kernels.gated` has it, from sums that are not rounded before; bits and x as above."""
    return _make(weight, bias, gated=True)


def _make(weight: Tensor, bias: Tensor | None, gated: bool) -> Linear:
    weight = weight.contiguous()
    return lambda x: multiply(x, weight, bias, gated=gated)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, side_by_side: bool | None = None
) -> Tensor:
    """`x @ weight.T + bias`, summed in fp32 and rounded once; gated, `silu` of its first half times its second.

    Shapes: x `[T, K]`, weight `[N, K]`, bias `[N]`, all contiguous and of one dtype; result `[T, N]`, gated
    `[T, N / 2]`.
    `side_by_side` says whether segments are; None chooses what is faster, and the bits are the same.
    Raises ValueError when x is not contiguous.
    """
    if not x.is_contiguous():
        raise ValueError("x must be contiguous; call .contiguous() where the view is made")
    (num_tokens, depth), outputs, size = x.shape, len(weight), x.element_size()
    width = outputs // 2 if gated else outputs
    out = x.new_empty(num_tokens, width)
    if not num_tokens:
        return out
    segments = segments_of(outputs, depth, size)
    tile = linear_tile(num_tokens, size, segments.number > 1)
    grid = triton.cdiv(num_tokens, tile.tokens), triton.cdiv(width, HALF if gated else 2 * HALF)
    if side_by_side is None:
        workspace = segments.number * num_tokens * outputs * 4
        side_by_side = grid[0] * grid[1] < PROGRAMS * 2 // 3 and workspace <= WORKSPACE_BYTES
    side_by_side = side_by_side and segments.number > 1
    target = out
    if side_by_side:
        target = x.new_empty(segments.number, num_tokens, outputs, dtype=torch.float32)
    _linear_kernel[(*grid, segments.number if side_by_side else 1)](
        x,
        weight,
        bias,
        target,
        num_tokens,
        OUTPUTS=outputs,
        DEPTH=depth,
        GATED=gated,
        SEGMENTS=segments.number,
        SEGMENT_TILES=segments.tiles,
        SIDE_BY_SIDE=side_by_side,
        HALF=HALF,
        BLOCK_T=tile.tokens,
        BLOCK_K=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    if side_by_side:
        _add_segments[(num_tokens, triton.cdiv(width, FINISH_COLUMNS))](
            target,
            bias,
            out,
            num_tokens,
            OUTPUTS=outputs,
            GATED=gated,
            SEGMENTS=segments.number,
            BLOCK=FINISH_COLUMNS,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return out
