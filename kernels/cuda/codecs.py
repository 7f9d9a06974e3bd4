"""Codes of pages in registers: `codec_format.py` says how they lie, `page_codec.py` what they are, bit for bit.

Kernels that decode must be launched without `enable_fp_fusion`, since a product and a sum round one after the other.
"""

import triton
import triton.language as tl

FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
"""`CodecFormat.number`; 0 in the place of a codec stands for none."""

TO_WHOLE = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to a smaller number loses its fraction, to the nearest and to even in the middle."""


@triton.jit
def highest_code(CODEC: tl.constexpr):
    """See `CodecFormat.levels`."""
    return 448.0 if CODEC == FP8 else 127.0 if CODEC == INT8 else 15.0


@triton.jit
def encode_groups(x, AXIS: tl.constexpr, CODEC: tl.constexpr):
    """Of fp32 numbers, each group along a dim: what a code is stored as (int32; of int4 not yet two in a byte), and the
    groups' lowest and highest values, or 0 and the largest absolute value, with a dim of 1 in the place of the group's.
    """
    LEVELS: tl.constexpr = highest_code(CODEC)
    odd = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), AXIS, keep_dims=True) > 0  # a number that is not finite
    if CODEC == INT4:
        lowest = tl.where(odd, float("nan"), tl.min(x, AXIS, keep_dims=True))
        highest = tl.where(odd, float("nan"), tl.max(x, AXIS, keep_dims=True))
    else:
        highest = tl.where(odd, float("nan"), tl.max(tl.abs(x), AXIS, keep_dims=True))
        lowest = tl.zeros_like(highest)
    step = (highest - lowest) * (1.0 / LEVELS)
    code = tl.where(step == 0.0, 0.0, tl.div_rn(x - lowest, tl.where(step == 0.0, 1.0, step)))
    code = tl.where(code == code, code, 0.0)
    code = tl.minimum(tl.maximum(code, 0.0 if CODEC == INT4 else -LEVELS), LEVELS)
    if CODEC == FP8:
        bits = code.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # below the least normal number, 2^-6, steps are of 2^-9
        small = (tl.abs(code) * 512.0 + TO_WHOLE - TO_WHOLE).to(tl.int32)
        normal = ((size + ((1 << 19) - 1) + (size >> 20 & 1)) >> 20) - (120 << 3)
        found = tl.where(size < (121 << 23), small, normal)
        stored = found | tl.where(found > 0, bits >> 24 & 0x80, 0)  # there is no -0
    else:
        stored = (code + TO_WHOLE - TO_WHOLE).to(tl.int32) & (15 if CODEC == INT4 else 255)
    return stored, lowest, highest


@triton.jit
def decode_groups(stored, lowest, highest, CODEC: tl.constexpr):
    """The inverse: fp32 numbers, not yet rounded to the pages' dtype; `stored` is of any width."""
    LEVELS: tl.constexpr = highest_code(CODEC)
    if CODEC == FP8:
        wide = stored.to(tl.int32)
        size = wide & 0x7F
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        code = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        code = tl.where(wide >= 128, -code, code)
    elif CODEC == INT8:
        code = stored.to(tl.int8).to(tl.float32)
    else:
        code = stored.to(tl.float32)
    numbers = lowest + code * ((highest - lowest) * (1.0 / LEVELS))
    numbers = tl.where(code == LEVELS, highest, numbers)
    if CODEC != INT4:
        numbers = tl.where(code == -LEVELS, 0.0 - highest, numbers)
    return numbers


@triton.jit
def load_codes(
    block, token, fits, VALUES: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """What the codes of `[tokens, BLOCK_D]` numbers are stored as. `block` points at the first byte of keys, or values,
    for each token or for all; `token` is its number in the page, `[tokens, 1]`. Read where `fits`, of a shape that goes
    with it."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    COUNT: tl.constexpr = HEAD_DIM if VALUES else PAGE_SIZE  # of a row
    row = token if VALUES else dim
    at = dim if VALUES else token
    if CODEC == INT4:
        HALF: tl.constexpr = 16 if GROUP >= 32 else 8
        byte = row * (COUNT // 2) + at // (2 * HALF) * HALF + at % HALF
        both = tl.load(block + byte, mask=fits & (dim < HEAD_DIM), other=0)
        return tl.where(at // HALF % 2 == 0, both & 15, both >> 4)
    else:
        return tl.load(block + row * COUNT + at, mask=fits & (dim < HEAD_DIM), other=0)


@triton.jit
def store_codes(
    block, stored, row, first, in_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    COUNT: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """The inverse, of some rows `[ROWS, COLUMNS]` of numbers from the `first` of each on, a multiple of the group.
    `row` `[ROWS, 1]` are written where `in_rows`, of `COUNT` numbers each."""
    if CODEC == INT4:
        HALF: tl.constexpr = 16 if GROUP >= 32 else 8
        by_unit = tl.reshape(stored, [ROWS, COLUMNS // (2 * HALF), 2, HALF])
        low, high = tl.split(tl.permute(by_unit, [0, 1, 3, 2]))
        byte = first // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        both = tl.reshape(low | high << 4, [ROWS, COLUMNS // 2])
        tl.store(block + row * (COUNT // 2) + byte, both.to(tl.uint8), mask=in_rows & (byte < COUNT // 2))
    else:
        byte = first + tl.arange(0, COLUMNS)[None, :]
        tl.store(block + row * COUNT + byte, stored.to(tl.uint8), mask=in_rows & (byte < COUNT))


@triton.jit
def store_ends(first, DISTANCE: tl.constexpr, lowest, highest, inside, CODEC: tl.constexpr):
    """Writes the scales of groups: what `_ends` gives back. `first` points at the first scale of each."""
    if CODEC == INT4:
        tl.store(first, lowest.to(first.dtype.element_ty), mask=inside)
        tl.store(first + DISTANCE, highest.to(first.dtype.element_ty), mask=inside)
    else:
        tl.store(first, highest.to(first.dtype.element_ty), mask=inside)


@triton.jit
def decode_keys(stored, scales, group, fits, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, CODEC: tl.constexpr):
    """`decode_groups` of keys `[rows, BLOCK_D]`. `scales` points at the first scale of each row's block, `group` says
    which of its groups of tokens; both, and `fits`, are of a shape that goes with the rows'."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    NUM_SCALES: tl.constexpr = 2 if CODEC == INT4 else 1
    first = scales + group * (NUM_SCALES * HEAD_DIM) + dim
    lowest, highest = _ends(first, HEAD_DIM, fits & (dim < HEAD_DIM), CODEC)
    return decode_groups(stored, lowest, highest, CODEC)


@triton.jit
def decode_values(
    stored, scales, token, fits, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """`decode_groups` of values `[ROWS, BLOCK_D]`, of which `token` is the number in the page, `[ROWS, 1]`."""
    BLOCK_G: tl.constexpr = BLOCK_D // GROUP
    NUM_SCALES: tl.constexpr = 2 if CODEC == INT4 else 1
    group = tl.arange(0, BLOCK_G)
    first = scales + group * (NUM_SCALES * PAGE_SIZE) + token
    lowest, highest = _ends(first, PAGE_SIZE, fits & (group < HEAD_DIM // GROUP), CODEC)
    grouped = tl.reshape(stored, [ROWS, BLOCK_G, GROUP])
    return tl.reshape(decode_groups(grouped, lowest[:, :, None], highest[:, :, None], CODEC), [ROWS, BLOCK_D])


@triton.jit
def _ends(first, DISTANCE: tl.constexpr, inside, CODEC: tl.constexpr):
    """What lies at a group's first scale, and at its last one."""
    if CODEC == INT4:
        lowest = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        highest = tl.load(first + DISTANCE, mask=inside, other=0.0).to(tl.float32)
    else:
        highest = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        lowest = tl.zeros_like(highest)
    return lowest, highest
