"""The CUDA kernels that work token by token, and the copy of pages, in Triton's interpreter against their definitions.

bfloat16 is left out: the interpreter rounds its arithmetic wrongly.
"""

import mmap
import sys
import tempfile

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.measures import relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.cuda_kernels import CUDA_KERNELS
from distkv.kernels.cuda.norm import rms_norm
from distkv.kernels.cuda.page_copy import copy_pages
from distkv.kernels.cuda.rope import rope_and_write_kv
from distkv.kernels.linear import plain_linear
from distkv.kernels.token_kernels import TokenKernels
from distkv.storage.pools.host_memory import as_integers, lazy_zeros

pytestmark = pytest.mark.interpreter

ONE_ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4}
"""Largest relative error in the Euclidean norm of what is computed in fp32 and rounded once."""

dtypes = st.sampled_from(list(ONE_ROUNDING))
any_dtype = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
seeds = st.integers(0, 2**32 - 1)
head_dims = st.sampled_from([2, 6, 16, 64, 80, 96, 128])


@given(
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(0, 5),
    hidden=st.one_of(st.integers(1, 700), st.sampled_from([576, 4096, 16384])),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    adds=st.booleans(),
)
def test_rms_norm(
    dtype: torch.dtype, seed: int, tokens: int, hidden: int, scale: float, eps: float, adds: bool
) -> None:
    generator = seeded(seed)
    x, delta = (torch.randn(2, tokens, hidden, generator=generator) * scale).to(dtype)
    weight = torch.randn(hidden, generator=generator).to(dtype)
    added = x + delta if adds else x.clone()
    result = rms_norm(x, weight, eps, delta if adds else None)
    assert result.dtype == dtype and result.shape == x.shape
    assert torch.equal(x, added)
    assert relative_error(result, reference.rms_norm(added, weight, eps)) < ONE_ROUNDING[dtype]


def test_the_norm_is_of_the_rounded_sum() -> None:
    """2048 + 1 is 2048 in fp16, and the norm of equal numbers is 1."""
    delta = torch.zeros(1, 8).half()
    delta[0, 0] = 1
    result = rms_norm(torch.full_like(delta, 2048), torch.full_like(delta[0], 1.5), 1e-6, delta)
    assert (result == 1.5).all()


@given(
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(0, 5),
    width=st.one_of(st.integers(1, 300), st.integers(1000, 2100)),
    scale=st.sampled_from([0.3, 1.0, 20.0]),  # less would be subnormal in fp16
)
def test_swiglu(dtype: torch.dtype, seed: int, tokens: int, width: int, scale: float) -> None:
    gate_up = (torch.randn(tokens, 2 * width, generator=seeded(seed)) * scale).to(dtype)
    before = gate_up.clone()
    result = swiglu(gate_up)
    assert result.dtype == dtype and result.shape == (tokens, width)
    assert relative_error(result, reference.swiglu(before)) < ONE_ROUNDING[dtype]
    assert torch.equal(gate_up, before)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", list(ONE_ROUNDING), ids=str)
def test_swiglu_of_large_gates(dtype: torch.dtype) -> None:
    """An exponential that overflows leaves no NaN."""
    gate = torch.tensor([[-6e4, -100.0, 100.0, 6e4]], dtype=dtype)
    result = swiglu(torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert result.tolist() == [[0.0, pytest.approx(0, abs=1e-40), 100.0, gate[0, 3].item()]]


@given(
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(0, 9),
    padding=st.integers(0, 3),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    head_dim=head_dims,
    page_size=st.sampled_from([16, 64]),
)
def test_rope_and_write_kv(
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    padding: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
) -> None:
    """Queries and keys are rotated in place, and of the pool exactly the addressed places of one layer change."""
    generator, num_pages, query_heads = seeded(seed), 5, kv_heads * group
    qkv = torch.randn(tokens + padding, query_heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    angle = torch.randn(tokens + padding, 1, head_dim // 2, generator=generator) * 10
    pool = torch.randn(3, 2, num_pages, kv_heads, page_size, head_dim, generator=generator).to(dtype)
    place = torch.randperm(num_pages * page_size, generator=generator)[: tokens + padding]
    page, offset = place // page_size, place % page_size
    page[torch.randperm(tokens + padding, generator=generator)[:padding]] = -1
    expected_pool, original = pool.clone(), qkv.clone()

    q, k, v = rope_and_write_kv(qkv, angle.cos(), angle.sin(), pool[1], page, offset)

    rotated = reference.rotate(original[:, : query_heads + kv_heads], angle.cos(), angle.sin())
    assert relative_error(q, rotated[:, :query_heads]) < ONE_ROUNDING[dtype]
    assert relative_error(k, rotated[:, query_heads:]) < ONE_ROUNDING[dtype]
    assert torch.equal(v, original[:, query_heads + kv_heads :])
    assert torch.equal(torch.cat([q, k, v], dim=1), qkv)
    for token in range(tokens + padding):
        if page[token] >= 0:
            expected_pool[1, 0, page[token], :, offset[token]] = k[token]
            expected_pool[1, 1, page[token], :, offset[token]] = v[token]
    assert torch.equal(pool, expected_pool)


def test_rope_writes_beyond_2_31_elements() -> None:
    """The last page of a pool, which nobody could reach with 32 bits; the rest is never touched and takes no memory."""
    kv_heads, page_size, head_dim = 8, 512, 128
    num_pages = 2**31 // (kv_heads * page_size * head_dim) + 2
    pool = lazy_zeros((2, num_pages, kv_heads, page_size, head_dim), torch.float16)
    qkv = torch.randn(1, 3 * kv_heads, head_dim, generator=seeded(0)).half()
    angle = torch.randn(1, 1, head_dim // 2, generator=seeded(1))
    page, offset = torch.tensor([num_pages - 1]), torch.tensor([page_size - 1])
    _, k, v = rope_and_write_kv(qkv, angle.cos(), angle.sin(), pool, page, offset)
    assert torch.equal(pool[0, -1, :, -1], k[0]) and torch.equal(pool[1, -1, :, -1], v[0])
    assert not pool[0, 0].any() and not pool[:, -1, :, :-1].any()


def test_layouts_that_the_kernels_do_not_read_are_refused() -> None:
    wide, row = torch.zeros(4, 16), torch.zeros(8)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(wide[:, :8], row, 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(wide[:, :8].contiguous(), row, 1e-5, wide[:, 8:])
    with pytest.raises(ValueError, match="contiguous"):
        swiglu(wide[:, :8])
    angle, index, pool = torch.zeros(2, 1, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 1, 16, 8)
    with pytest.raises(ValueError, match="qkv"):
        rope_and_write_kv(torch.zeros(2, 5, 8)[:, :4], angle, angle, pool, index, index)
    with pytest.raises(ValueError, match="page of the pool"):
        rope_and_write_kv(torch.zeros(2, 4, 8), angle, angle, pool.transpose(2, 3), index, index)
    pages, pairs = torch.zeros(2, 3, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="pages of"):
        copy_pages(pages, pages[:, :2], pairs, 1)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        copy_pages(pages[:, :, :6], pages[:, :, :6], pairs, 1)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        copy_pages(torch.zeros(2, 3, 10)[:, :, :8], pages, pairs, 1)


def test_token_kernels_of_cuda_are_these() -> None:
    gated = CUDA_KERNELS.make_gated_linear
    assert TokenKernels("triton", rms_norm, rope_and_write_kv, plain_linear, gated) == CUDA_KERNELS


def random_bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern: NaNs of all kinds, infinities, subnormals."""
    *leading, last = shape
    return torch.randint(256, (*leading, last * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert (as_integers(actual.contiguous()) == as_integers(expected.contiguous())).all()


@given(
    dtype=any_dtype,
    seed=seeds,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    page_size=st.sampled_from([16, 32, 64]),
    head_dim=st.sampled_from([2, 6, 64, 80]),
    pages=st.integers(1, 6),
    count=st.integers(0, 6),
    num_programs=st.sampled_from([1, 3, 7, 100]),
    to_device=st.booleans(),
)
def test_copy_pages(
    dtype: torch.dtype,
    seed: int,
    layers: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    pages: int,
    count: int,
    num_programs: int,
    to_device: bool,
) -> None:
    """Whole pages between a host pool, where a page is one block, and a device pool, where it is one of each layer."""
    generator, block = seeded(seed), (kv_heads, page_size, head_dim)
    host = random_bits(generator, (pages, layers, 2, *block), dtype)
    device = random_bits(generator, (layers, 2, pages + 2, *block), dtype)
    host_pages = host.view(pages, 2 * layers, -1)
    device_pages = device.view(2 * layers, pages + 2, -1).transpose(0, 1)
    assert host_pages.data_ptr() == host.data_ptr() and device_pages.data_ptr() == device.data_ptr()
    source, target = (host_pages, device_pages) if to_device else (device_pages, host_pages)
    count = min(count, pages)
    froms, tos = (torch.randperm(len(side), generator=generator)[:count] for side in (source, target))
    before, expected = source.clone(), target.clone()
    as_integers(expected)[tos.numpy()] = as_integers(before)[froms.numpy()]

    copy_pages(source, target, torch.stack([froms, tos], dim=1), num_programs)

    assert_same_bits(target, expected)
    assert_same_bits(source, before)


def test_copy_pages_of_several_tiles() -> None:
    """A block of 2.5 tiles, in a buffer whose rows are longer than a block."""
    generator = seeded(3)
    buffer = random_bits(generator, (4, 2, 3 * 8192), torch.float16)
    target = random_bits(generator, (3, 2, 20480), torch.float16)
    before = target.clone()
    copy_pages(buffer[:, :, 8:20488], target, torch.tensor([[3, 0], [1, 2]]), 4)
    assert_same_bits(target[0], buffer[3, :, 8:20488])
    assert_same_bits(target[2], buffer[1, :, 8:20488])
    assert_same_bits(target[1], before[1])


@pytest.mark.parametrize("to_device", [True, False])
def test_copy_pages_beyond_2_31_words(to_device: bool) -> None:
    """The last page of a pool whose parts lie more than 2^31 words of 8 bytes from one another.

    Nobody touches what lies between, so it takes no memory: the file of the pool is one long hole.
    """
    num_pages, block = 2**21 + 2, 4096
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * num_pages * block * 2)
        pool = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
    pool = pool.view(2, num_pages, block).transpose(0, 1)
    small = random_bits(seeded(5), (2, 2, block), torch.float16)
    if to_device:
        copy_pages(small, pool, torch.tensor([[1, num_pages - 1]]), 2)
        assert_same_bits(pool[-1], small[1])
        assert not pool[0].any() and not pool[-2].any()
    else:
        pool[-1] = small[1]
        copy_pages(pool, small, torch.tensor([[num_pages - 1, 0]]), 2)
        assert_same_bits(small[0], small[1])
