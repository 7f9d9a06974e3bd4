"""The kernels of codes for CUDA, in Triton's interpreter: bit for bit their definition, `page_codec.py`."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coded_pages import bits, some_pages
from torch import Tensor

from distkv.kernels.codec_format import FORMATS, CodecFormat
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.page_codec import decode, encode

pytestmark = pytest.mark.interpreter
few = settings(max_examples=12)
formats = st.sampled_from(list(FORMATS.values()))
dtypes = st.sampled_from([torch.float32, torch.float16])  # the interpreter rounds bfloat16 wrongly
seeds = st.integers(0, 2**32 - 1)
page_sizes = st.sampled_from([16, 32, 64, 128])
head_dims = st.sampled_from([16, 64, 80, 96, 128])


def rows(pool: Tensor) -> Tensor:
    """As `DevicePool.rows`."""
    return pool.flatten(0, 1).flatten(2).transpose(0, 1)


@few
@given(
    codec=formats, dtype=dtypes, seed=seeds, page_size=page_sizes, head_dim=head_dims,
    num_programs=st.sampled_from([1, 5, 1000]),
)  # fmt: skip
def test_pages_cross(
    codec: CodecFormat, dtype: torch.dtype, seed: int, page_size: int, head_dim: int, num_programs: int
) -> None:
    """From slots of a pool to pages of the host and back, and none is touched beside them."""
    pages = some_pages(seed, dtype, page_size, head_dim, 2, 3, size=0.01)  # [layer, slot, 2, head, ...]
    pool = pages.transpose(1, 2).contiguous()
    kernels = CudaCodec(codec, 2, page_size, head_dim)
    expected = encode(pages, codec).transpose(0, 1)  # [slot, layer, 2, head, S, R]
    host = torch.full((4, *expected.shape[1:]), 99, dtype=torch.uint8)
    kernels.encode_rows(rows(pool), host.flatten(1, 2).flatten(2), torch.tensor([[2, 0], [0, 3]]), num_programs)
    rounded = decode(expected, codec, dtype, head_dim)
    # -0 has a code of its own in fp8
    assert torch.equal(decode(host[[0, 3]], codec, dtype, head_dim), rounded[[2, 0]])
    assert (host[1:3] == 99).all()

    came_back = pool.clone()
    kernels.decode_rows(host.flatten(1, 2).flatten(2), rows(came_back), torch.tensor([[3, 1]]), num_programs)
    assert torch.equal(bits(came_back[:, :, 1]), bits(rounded[0]))
    assert torch.equal(came_back[:, :, [0, 2]], pool[:, :, [0, 2]])

    alone, back = torch.zeros_like(expected[0]), pool.clone()
    kernels.encode(pool, 2, alone)
    kernels.decode(alone, back, 0)
    assert torch.equal(bits(back[:, :, 0]), bits(rounded[2])) and torch.equal(back[:, :, 1:], pool[:, :, 1:])


@few
@given(codec=formats, dtype=dtypes, seed=seeds, page_size=page_sizes, head_dim=head_dims)
def test_pages_are_rounded_where_they_lie(
    codec: CodecFormat, dtype: torch.dtype, seed: int, page_size: int, head_dim: int
) -> None:
    pages = some_pages(seed, dtype, page_size, head_dim, 2, 4, size=0.01)
    pool = pages.transpose(1, 2).contiguous()
    layer, exact = pool[1].clone(), torch.full((3, *pages.shape[2:]), 7, dtype=dtype)
    CudaCodec(codec, 2, page_size, head_dim).round(layer, torch.tensor([3, -1, 1]), exact)
    assert torch.equal(exact[[0, 2]], pages[1, [3, 1]]) and (exact[1] == 7).all()
    rounded = decode(encode(pages[1], codec), codec, dtype, head_dim)
    for slot in range(4):
        assert torch.equal(bits(layer[:, slot]), bits((rounded if slot in (1, 3) else pages[1])[slot]))
    again = layer.clone()
    CudaCodec(codec, 2, page_size, head_dim).round(again, torch.tensor([1, 3]))
    assert torch.equal(bits(again), bits(layer))


@pytest.mark.parametrize("codec", FORMATS.values(), ids=FORMATS)
def test_what_is_not_finite_shows(codec: CodecFormat) -> None:
    pages = some_pages(0, torch.float16, 16, 64, 1)
    pages[0, 0, 0, 5, 7], pages[0, 1, 1, 3, 60] = torch.inf, torch.nan
    layer = pages.transpose(0, 1).contiguous()
    CudaCodec(codec, 2, 16, 64).round(layer, torch.tensor([0]))
    assert layer[0, 0, 0, :, 7].isnan().all() and layer[1, 0, 1, 3, 48:].isnan().all()
    assert layer.isnan().sum() == 16 + 16
