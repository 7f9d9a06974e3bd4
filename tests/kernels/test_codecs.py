"""Pages as codes: the bound of their error, values that stay what they are, and the native kernels bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.coded_pages import bits, some_pages
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.codec_format import FORMATS, CodecFormat, group_size
from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.instruction_sets import INSTRUCTION_SETS
from distkv.kernels.native.library import Library, load
from distkv.kernels.native.page_states import merge_page_states, page_states, state_width
from distkv.kernels.native.paged_attention import Chunks, CodedPages, attend_pages
from distkv.kernels.page_codec import decode, encode

libraries = st.sampled_from([load(one) for one in INSTRUCTION_SETS if one.is_here])
formats = st.sampled_from(list(FORMATS.values()))
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**32 - 1)
page_sizes = st.sampled_from([16, 32, 64, 128])
head_dims = st.sampled_from([16, 48, 64, 80, 128])


def steps_of(pages: Tensor, codec: CodecFormat) -> Tensor:
    """By the formula in float64: the distance of neighbouring codes around each number."""
    x = pages.double()
    page_size, head_dim = x.shape[-2:]
    group = group_size(page_size, head_dim)
    keys = x[..., 0, :, :, :].unflatten(-2, (-1, group))
    values = x[..., 1, :, :, :].unflatten(-1, (-1, group))
    steps = []
    for grouped, dim, flat in ((keys, -2, (-3, -2)), (values, -1, (-2, -1))):
        if codec.num_scales == 2:
            step = (grouped.amax(dim, keepdim=True) - grouped.amin(dim, keepdim=True)) / codec.levels
        elif codec.name == "int8":
            step = grouped.abs().amax(dim, keepdim=True) / codec.levels
        else:  # of 3 bits of mantissa, and 2^-9 at least
            scale = grouped.abs().amax(dim, keepdim=True) / codec.levels
            exponent = torch.floor(torch.log2((grouped / scale).abs().clamp(min=2.0**-6).nan_to_num(2.0**-6)))
            step = scale * 2.0 ** (exponent - 3)
        steps.append(step.expand_as(grouped).flatten(*flat))
    return torch.stack(steps, dim=-4)


@given(codec=formats, dtype=dtypes, seed=seeds, page_size=page_sizes, head_dim=head_dims)
def test_error_is_half_a_step(codec: CodecFormat, dtype: torch.dtype, seed: int, page_size: int, head_dim: int) -> None:
    """And what rounding to the dtype adds. Blocks are as large as the format says."""
    pages = some_pages(seed, dtype, page_size, head_dim)
    codes = encode(pages, codec)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 2, page_size, codec.row_bytes(page_size, head_dim, pages.element_size()))
    found = decode(codes, codec, dtype, head_dim).double()
    eps = torch.finfo(dtype).eps
    allowed = steps_of(pages, codec) * (0.5001 + eps) + pages.double().abs() * eps
    if codec.num_scales == 2:  # the lowest of a group is added, and rounds
        allowed += pages.double().abs().amax() * 2.0**-23
    assert ((found - pages.double()).abs() <= allowed).all()


@given(codec=formats, dtype=dtypes, seed=seeds, page_size=page_sizes, head_dim=head_dims, size=st.floats(-12, 12))
def test_a_decoded_value_stays(
    codec: CodecFormat, dtype: torch.dtype, seed: int, page_size: int, head_dim: int, size: float
) -> None:
    """Pages go down and come up any number of times, so this holds whatever a group's size."""
    pages = some_pages(seed, dtype, page_size, head_dim, size=10.0 ** (size / (4 if dtype == torch.float16 else 1)))
    once = decode(encode(pages, codec), codec, dtype, head_dim)
    assert torch.equal(bits(decode(encode(once, codec), codec, dtype, head_dim)), bits(once))


def test_every_range_of_bfloat16_keeps_its_values() -> None:
    """Of int4, whose ends and steps round: all pairs of ends up to a power of two, and all codes between them."""
    mantissa = torch.arange(128, 256, dtype=torch.float32)
    numbers = torch.cat([sign * mantissa * 2.0**exponent for sign in (-1, 1) for exponent in (0, -1, -4, -7, -9, -16)])
    codec = FORMATS["int4"]
    for first in numbers[numbers.abs() >= 128].split(64):  # one of both has the highest exponent
        ends = torch.stack(torch.broadcast_tensors(first[:, None], numbers[None]), dim=-1).flatten(0, 1)
        low, high = ends.amin(-1), ends.amax(-1)
        share = torch.arange(16) / 15
        group = (low[:, None] * (1 - share) + high[:, None] * share).to(torch.bfloat16)
        group[:, 0], group[:, 15] = low, high
        keys = group.T[None].expand(2, -1, -1)[:, None, :, : len(low) // 16 * 16]
        once = decode(encode(keys, codec), codec, torch.bfloat16, keys.shape[-1])
        assert torch.equal(decode(encode(once, codec), codec, torch.bfloat16, keys.shape[-1]), once)


@given(codec=formats, dtype=dtypes)
def test_what_is_not_finite_shows(codec: CodecFormat, dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        pages = some_pages(0, dtype, 16, 64)
        pages[0, 0, 5, 7] = pages[1, 1, 3, 60] = bad
        found = decode(encode(pages, codec), codec, dtype, 64)
        assert found[0, 0, :, 7].isnan().all() and found[1, 1, 3, 48:].isnan().all()
        assert found.isnan().sum() == 16 + 16


@given(kernels_of=libraries, codec=formats, dtype=dtypes, seed=seeds, page_size=page_sizes, head_dim=head_dims)
def test_native_codecs(
    kernels_of: Library, codec: CodecFormat, dtype: torch.dtype, seed: int, page_size: int, head_dim: int
) -> None:
    pool = some_pages(seed, dtype, page_size, head_dim, 2, 3).transpose(1, 2).contiguous()  # [layer, 2, slot, K, S, D]
    native, page = NativeCodec(kernels_of, codec), pool[:, :, 1]
    expected = encode(page, codec)
    codes = torch.zeros_like(expected)
    native.encode(pool, 1, codes)
    assert torch.equal(codes, expected)
    rounded = decode(expected, codec, dtype, head_dim)
    came_back = pool.clone()
    native.decode(codes, came_back, 1)
    assert torch.equal(bits(came_back[:, :, 1]), bits(rounded))
    assert torch.equal(came_back[:, :, [0, 2]], pool[:, :, [0, 2]])
    layer, exact = pool[1].clone(), torch.empty(2, 2, *pool.shape[3:], dtype=dtype)
    native.round(layer, torch.tensor([2, 1]), exact)
    assert torch.equal(exact, pool[1][:, [2, 1]].transpose(0, 1))
    assert torch.equal(bits(layer[:, 1]), bits(rounded[1])) and torch.equal(layer[:, 0], pool[1][:, 0])


def _merged(
    library: Library, q: Tensor, pool: Tensor, buffer: Tensor, table: Tensor, chunks: list[list[int]], coded: CodedPages
) -> Tensor:
    """The attention of chunks from the states of their pages, token by token."""
    items, offsets = [], [0]
    for row, count, start, _, _, end, _, exact in chunks:
        for index in range(row, row + count):
            for page in range(end):
                own = exact if page == end - 1 else -1
                items.append([index, 1, start + index - row, page, int(table[page]), own, len(items)])
            offsets.append(len(items))
    states = torch.empty(len(items), q.shape[1], state_width(q.shape[2]))
    page_states(library, q, pool, buffer, torch.tensor(items), states, coded)
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    merge_page_states(library, states, torch.arange(len(items)), torch.tensor(offsets), out)
    return out


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("codec", FORMATS.values(), ids=list(FORMATS))
@given(
    kernels_of=libraries, dtype=dtypes, seed=seeds, start=st.integers(0, 150), tokens=st.integers(1, 70),
    page_size=st.sampled_from([16, 64]), kv_heads=st.integers(1, 3), group=st.sampled_from([1, 3]),
    few=st.booleans(), cold=st.integers(0, 2**10),
)  # fmt: skip
def test_attention_over_codes(
    kernels_of: Library, codec: CodecFormat, dtype: torch.dtype, seed: int, start: int, tokens: int, page_size: int,
    kv_heads: int, group: int, head_dim: int, few: bool, cold: int,
) -> None:  # fmt: skip
    """A row meets its own page as it is, and those before it as their codes have them, which may lie in the pool or in
    a buffer: right, and bitwise the same."""
    generator, count = seeded(seed), -(-(start + tokens) // page_size)
    pool = torch.randn(2, count, kv_heads, page_size, head_dim, generator=generator).to(dtype)
    q = torch.randn(tokens, kv_heads * group, head_dim, generator=generator).to(dtype)
    native, first_own, num_full = NativeCodec(kernels_of, codec), start // page_size, (start + tokens) // page_size
    exact = torch.zeros(max(0, num_full - first_own), 2, kv_heads, page_size, head_dim, dtype=dtype)
    rounded = pool.clone()
    native.round(rounded, torch.arange(first_own))
    native.round(rounded, torch.arange(first_own, num_full), exact)
    buffer = encode(rounded.transpose(0, 1), codec)
    chunks = []
    for page in range(first_own, count):
        first, end = max(start, page * page_size), min(start + tokens, (page + 1) * page_size)
        chunks.append(
            [first - start, end - first, first, 0, 0, page + 1, 1, page - first_own if page < num_full else -1]
        )
    out = [q.new_empty(tokens, q.shape[1] * head_dim) for _ in range(2)]
    tables = torch.arange(count), torch.tensor([-1 - n if n < first_own and cold >> n & 1 else n for n in range(count)])
    for each, table in zip(out, tables, strict=True):
        numbers = torch.tensor(chunks)
        attend_pages(
            kernels_of, q, rounded, buffer, table, Chunks(numbers, len(chunks) if few else 0), None, each,
            CodedPages(codec, exact),
        )  # fmt: skip
    assert torch.equal(out[0], out[1])
    assert torch.equal(_merged(kernels_of, q, rounded, buffer, tables[1], chunks, CodedPages(codec, exact)), out[0])
    for page in range(first_own, count):
        seen = rounded.clone()
        seen[:, page] = pool[:, page]
        rows = slice(max(start, page * page_size) - start, min(start + tokens, (page + 1) * page_size) - start)
        keys, values = reference.read_pages(seen, list(range(count)), start + rows.stop)
        expected, _ = reference.attention(q[rows].unflatten(1, (kv_heads, -1)), keys, values)
        assert relative_error(out[0][rows], expected.flatten(1)) < TOLERANCE[dtype]
