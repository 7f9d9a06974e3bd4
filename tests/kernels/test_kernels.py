"""Every kernel against its float64 definition in `kernels/reference.py`, and what of it must hold bit for bit."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.activation import swiglu
from distkv.kernels.attention import State, attend, merge_states, prefill_attention
from distkv.kernels.cpu_kernels import CPU_KERNELS
from distkv.kernels.linear import packed_linear
from distkv.kernels.norm import rms_norm
from distkv.kernels.rope import rope_and_write_kv, rotate
from distkv.kernels.token_kernels import TokenKernels
from distkv.storage.paging import PREFILL_SPLIT
from distkv.workers.attention.cpu import prefix_pieces

ONE_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**32 - 1)
head_dims = st.sampled_from([2, 6, 16, 64, 80, 96, 128])
page_sizes = st.sampled_from([16, 32, 64, 128, 256, 512])


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert relative_error(actual, expected) < TOLERANCE[dtype]


def read_prefix(pool: Tensor, pages: np.ndarray, prefix_len: int) -> list[tuple[Tensor, Tensor]]:
    """The pieces of a prefix that lies in resident pages of `pool` `[2, pages, kv_head, page_size, head_dim]`."""
    pieces = prefix_pieces(pages, prefix_len, pool.shape[3])
    return [piece.gather(pool, None) for piece in pieces]


def assert_same(actual: State, expected: State) -> None:
    """Bit for bit."""
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@given(
    dtype=dtypes,
    seed=seeds,
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    hidden=st.integers(1, 700),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    adds=st.booleans(),
)
def test_rms_norm(
    dtype: torch.dtype, seed: int, leading: list[int], hidden: int, scale: float, eps: float, adds: bool
) -> None:
    """Of x, or with a delta of the rounded sum, which x becomes."""
    generator = seeded(seed)
    x, delta = (torch.randn(2, *leading, hidden, generator=generator) * scale).to(dtype)
    weight = torch.randn(hidden, generator=generator).to(dtype)
    added = x + delta if adds else x.clone()
    result = rms_norm(x, weight, eps, delta if adds else None)
    assert result.dtype == dtype
    assert torch.equal(x, added)
    assert_close(result, reference.rms_norm(added, weight, eps), dtype)


def test_token_kernels_of_a_cpu_are_those_in_torch() -> None:
    gated = CPU_KERNELS.make_gated_linear
    assert TokenKernels("torch", rms_norm, rope_and_write_kv, packed_linear, gated) == CPU_KERNELS


@given(
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(1, 9),
    width=st.integers(16, 300),
    scale=st.sampled_from([0.3, 1.0, 20.0]),  # less would be subnormal in fp16
)
def test_swiglu(dtype: torch.dtype, seed: int, tokens: int, width: int, scale: float) -> None:
    gate_up = (torch.randn(tokens, 2 * width, generator=seeded(seed)) * scale).to(dtype)
    before = gate_up.clone()
    result = swiglu(gate_up)
    assert result.dtype == dtype
    assert_close(result, reference.swiglu(before), dtype)
    assert torch.equal(gate_up, before)


@given(dtype=dtypes, seed=seeds, tokens=st.integers(1, 9), heads=st.integers(1, 6), head_dim=head_dims)
def test_rotate(dtype: torch.dtype, seed: int, tokens: int, heads: int, head_dim: int) -> None:
    generator = seeded(seed)
    x = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    angle = torch.randn(tokens, 1, head_dim // 2, generator=generator) * 10
    result = rotate(x, angle.cos(), angle.sin())
    assert result.dtype == dtype
    # computed in fp32: half precision enters by one rounding of the result
    assert relative_error(result, reference.rotate(x, angle.cos(), angle.sin())) < ONE_ROUNDING[dtype]


@given(
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=head_dims,
)
def test_rope_and_write_kv(
    dtype: torch.dtype, seed: int, tokens: int, kv_heads: int, group: int, head_dim: int
) -> None:
    """Queries and keys come out rotated, and of the pool exactly the addressed places change."""
    generator, page_size, num_pages = seeded(seed), 16, 5
    query_heads = kv_heads * group
    qkv = torch.randn(tokens, query_heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    angle = torch.randn(tokens, 1, head_dim // 2, generator=generator) * 10
    cos, sin = angle.cos(), angle.sin()
    pool = torch.randn(2, num_pages, kv_heads, page_size, head_dim, generator=generator).to(dtype)
    place = torch.randperm(num_pages * page_size, generator=generator)[:tokens]
    page, offset = place // page_size, place % page_size
    expected_pool, original = pool.clone(), qkv.clone()

    q, k, v = rope_and_write_kv(qkv, cos, sin, pool, page, offset)

    rotated = reference.rotate(original[:, : query_heads + kv_heads], cos, sin)
    assert q.dtype == k.dtype == v.dtype == dtype
    assert_close(q, rotated[:, :query_heads], dtype)
    assert_close(k, rotated[:, query_heads:], dtype)
    assert torch.equal(v, original[:, query_heads + kv_heads :])
    for token in range(tokens):
        expected_pool[0, page[token], :, offset[token]] = k[token]
        expected_pool[1, page[token], :, offset[token]] = v[token]
    assert torch.equal(pool, expected_pool)


def dense(
    seed: int, dtype: torch.dtype, rows: int, keys: int, head_dim: int, batch: int = 2, heads: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[batch, heads, rows, head_dim]`, k and v `[batch, heads, keys, head_dim]`; keys wide enough for sharp rows."""
    generator = seeded(seed)
    q = torch.randn(batch, heads, rows, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(2, batch, heads, keys, head_dim, generator=generator) * 1.5).to(dtype)
    return q, k, v


def reference_rows(q: Tensor, k: Tensor, v: Tensor) -> State:
    """Every row of q `[H, R, D]` over all of k, v `[H, N, D]`: rows are the group of one last token."""
    out, lse = reference.attention(q[None], k.transpose(0, 1), v.transpose(0, 1))
    return out[0], lse[0]


@given(dtype=dtypes, seed=seeds, rows=st.integers(1, 40), keys=st.integers(1, 600), head_dim=head_dims)
def test_attend(dtype: torch.dtype, seed: int, rows: int, keys: int, head_dim: int) -> None:
    q, k, v = dense(seed, dtype, rows, keys, head_dim)
    out, lse = attend(q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    for n in range(len(q)):
        expected_out, expected_lse = reference_rows(q[n], k[n], v[n])
        assert_close(out[n], expected_out, dtype)
        assert_close(lse[n], expected_lse, dtype)


@given(dtype=dtypes, seed=seeds, tokens=st.integers(1, 300), head_dim=head_dims)
def test_attend_causal(dtype: torch.dtype, seed: int, tokens: int, head_dim: int) -> None:
    q, k, v = dense(seed, dtype, tokens, tokens, head_dim)
    out, lse = attend(q, k, v, causal=True)
    for n in range(len(q)):
        each = (x[n].transpose(0, 1) for x in (q.unsqueeze(3), k, v))
        expected_out, expected_lse = reference.attention(*each)
        assert_close(out[n], expected_out[:, :, 0].transpose(0, 1), dtype)
        assert_close(lse[n], expected_lse[:, :, 0].T, dtype)


@given(
    dtype=dtypes,
    seed=seeds,
    rows=st.integers(1, 12),
    keys=st.integers(1, 300),
    head_dim=head_dims,
    seen=st.sampled_from([0.02, 0.5, 0.95]),
)
def test_attend_masked(dtype: torch.dtype, seed: int, rows: int, keys: int, head_dim: int, seen: float) -> None:
    """A row attends to the keys its mask leaves, as if the others were not there."""
    q, k, v = dense(seed, dtype, rows, keys, head_dim)
    generator = seeded(seed + 1)
    visible = torch.rand(len(q), 1, rows, keys, generator=generator) < seen
    visible.scatter_(3, torch.randint(keys, (len(q), 1, rows, 1), generator=generator), True)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    out, lse = attend(q, k, v, mask=mask)
    for n in range(len(q)):
        for row in range(rows):
            left = visible[n, 0, row]
            expected_out, expected_lse = reference_rows(q[n, :, row : row + 1], k[n][:, left], v[n][:, left])
            assert_close(out[n, :, row : row + 1], expected_out, dtype)
            assert_close(lse[n, :, row : row + 1], expected_lse, dtype)


@given(
    seed=seeds,
    rows=st.integers(1, 5),
    head_dim=head_dims,
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    empty=st.lists(st.integers(0, 8), max_size=3),
    dim=st.integers(0, 1),
)
def test_merge_states(seed: int, rows: int, head_dim: int, cuts: list[int], empty: list[int], dim: int) -> None:
    """The merge of the states of disjoint keys is the attention over their union, whatever empty states lie between."""
    q, k, v = (x[0] for x in dense(seed, torch.float32, rows, sum(cuts), head_dim, batch=1))
    states = [
        reference_rows(q, k_part, v_part)
        for k_part, v_part in zip(k.split(cuts, dim=1), v.split(cuts, dim=1), strict=True)
    ]
    for place in empty:
        states.insert(place, (torch.full_like(states[0][0], 1e30), torch.full_like(states[0][1], -torch.inf)))
    outs, lses = (torch.stack(part, dim=dim).float() for part in zip(*states, strict=True))

    out, lse = merge_states(outs, lses, dim)

    expected_out, expected_lse = reference_rows(q, k, v)
    assert out.dtype == lse.dtype == torch.float32
    assert_close(out, expected_out, torch.float32)
    assert_close(lse, expected_lse, torch.float32)


@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16]), count=st.integers(2, 40))
def test_merge_states_is_in_fp32(seed: int, dtype: torch.dtype, count: int) -> None:
    """States in half precision lose nothing more on the way."""
    generator = seeded(seed)
    outs = torch.randn(count, 3, 4, 64, generator=generator).to(dtype)
    lses = torch.randn(count, 3, 4, generator=generator)
    weight = torch.softmax(lses.double(), dim=0)
    assert_close(merge_states(outs, lses, 0)[0], (outs.double() * weight[..., None]).sum(0), torch.float32)


@given(
    seed=seeds,
    count=st.integers(2, 100),
    rows=st.integers(1, 8),
    heads=st.integers(1, 8),
    head_dim=st.sampled_from([16, 64, 80]),
)
def test_merge_states_ignores_the_memory_layout(seed: int, count: int, rows: int, heads: int, head_dim: int) -> None:
    """Bitwise the same for any order of the dims in memory: states come as they lie, after whatever path."""
    generator = seeded(seed)
    outs = torch.randn(count, heads, rows, head_dim, generator=generator)
    lses = torch.randn(count, heads, rows, generator=generator)
    expected = merge_states(outs, lses, 0)
    for order in ((0, 2, 1), (2, 1, 0), (1, 0, 2)):
        back = [order.index(dim) for dim in range(3)]
        outs_laid, lses_laid = (x.permute(*order, *range(3, x.dim())).contiguous() for x in (outs, lses))
        assert_same(merge_states(outs_laid.permute(*back, 3), lses_laid.permute(back), 0), expected)
    out, lse = merge_states(outs[None], lses[None], 1)
    assert_same((out[0], lse[0]), expected)


@given(
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(1, 40),
    prefix_len=st.one_of(st.integers(0, 700), st.integers(PREFILL_SPLIT - 1, 2 * PREFILL_SPLIT + 100)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    page_size=page_sizes,
    head_dim=st.sampled_from([2, 16, 64, 80]),
)
def test_prefill_attention(
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    prefix_len: int,
    kv_heads: int,
    group: int,
    page_size: int,
    head_dim: int,
) -> None:
    """A chunk over a prefix in scattered pages, whose unused places hold large numbers."""
    generator = seeded(seed)
    total = prefix_len + tokens
    keys, values = (torch.randn(2, total, kv_heads, head_dim, generator=generator) * 1.5).to(dtype)
    # queries are a view of the fused projection, as in the model
    q = torch.randn(tokens, kv_heads + 2, group, head_dim, generator=generator).to(dtype)[:, :kv_heads]
    pages = torch.randperm(-(-total // page_size) + 3, generator=generator)[: -(-total // page_size)]
    pool = torch.full((2, len(pages) + 3, kv_heads, page_size, head_dim), 6e4, dtype=dtype)
    for token in range(prefix_len):
        pool[0, pages[token // page_size], :, token % page_size] = keys[token]
        pool[1, pages[token // page_size], :, token % page_size] = values[token]

    prefix_pages = pages[: -(-prefix_len // page_size)]
    prefix = read_prefix(pool, prefix_pages.numpy(), prefix_len)
    out, lse = prefill_attention(q, keys[prefix_len:], values[prefix_len:], prefix)

    assert out.dtype == dtype
    expected, expected_lse = reference.attention(q, keys, values)
    assert_close(out, expected, dtype)
    assert_close(lse, expected_lse, dtype)


@pytest.mark.parametrize("prefix_len", [1, 15, 16, 17, 2047, 2048, 2049, 4096])
@pytest.mark.parametrize("page_size", [16, 512, 4096])
def test_prefill_attention_at_the_edges(prefix_len: int, page_size: int) -> None:
    """Prefixes that end at or around the end of a page or of a split; pages larger than a split."""
    generator = seeded(prefix_len)
    keys, values = torch.randn(2, prefix_len + 9, 1, 16, generator=generator)
    q = torch.randn(9, 1, 2, 16, generator=generator)
    count = -(-prefix_len // page_size)
    pool = torch.full((2, count * page_size, 16), 1e30)
    pool[0, :prefix_len], pool[1, :prefix_len] = keys[:prefix_len, 0], values[:prefix_len, 0]
    pool = pool.reshape(2, count, 1, page_size, 16)
    prefix = read_prefix(pool, np.arange(count), prefix_len)
    out, _ = prefill_attention(q, keys[prefix_len:], values[prefix_len:], prefix)
    assert_close(out, reference.attention(q, keys, values)[0], torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 24, 33])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_state_of_a_page_is_bitwise_its_own(
    dtype: torch.dtype, head_dim: int, rows: int, set_threads: Callable[[int], None]
) -> None:
    """Alone or among other pages, with a mask of zeros or none, from a copied page or a view of the pool, with one
    thread or two: always the same bits. Residency invariance rests on this."""
    count, generator = 4, seeded(rows)
    for page_size, heads in itertools.product((16, 512), (1, 3)):
        pool = torch.randn(2, count + 2, heads, page_size, head_dim, generator=generator).to(dtype)
        query = torch.randn(1, heads, rows, head_dim, generator=generator).to(dtype)
        k, v = pool[:, 1 : count + 1]  # a run of neighbours
        shared = query.expand(count, -1, -1, -1)
        zeros = torch.zeros(count, 1, rows, page_size, dtype=dtype)
        set_threads(1)
        expected = attend(shared, k, v)
        set_threads(2)
        variants = {
            "two threads": attend(shared, k, v),
            "mask of zeros": attend(shared, k, v, mask=zeros),
            "own queries": attend(shared.contiguous(), k, v),
            "copied run": attend(shared, k.clone(), v.clone()),
            "as a layer of host pages": attend(shared, *torch.stack([k, v, k, v], dim=1)[:, :2].unbind(1)),
            "alone": page_by_page(query, k, v),
            "alone with mask": page_by_page(query, k, v, mask=zeros),
            "alone and copied": page_by_page(query, k, v, copy=True),
        }
        for name, (out, lse) in variants.items():
            assert torch.equal(out, expected[0]), f"out: {name}, {page_size=}, {heads=}"
            assert torch.equal(lse, expected[1]), f"lse: {name}, {page_size=}, {heads=}"


def page_by_page(query: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, copy: bool = False) -> State:
    """The state of each page by a call of its own."""
    outs, lses = [], []
    for page in range(len(k)):
        k_page, v_page = k[page : page + 1], v[page : page + 1]
        if copy:
            k_page, v_page = k_page.clone(), v_page.clone()
        out, lse = attend(query, k_page, v_page, mask=None if mask is None else mask[page : page + 1])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


@given(
    dtype=dtypes,
    seed=seeds,
    rows=st.integers(1, 9),
    keys=st.integers(1, 15),
    page_size=page_sizes,
    head_dim=st.sampled_from([64, 80, 96, 128]),
)
def test_masked_keys_leave_no_bit(
    dtype: torch.dtype, seed: int, rows: int, keys: int, page_size: int, head_dim: int
) -> None:
    """Whatever finite number lies behind the mask, the state is the same."""
    q, k, v = dense(seed, dtype, rows, page_size, head_dim)
    mask = torch.zeros(len(q), 1, rows, page_size, dtype=dtype)
    mask[..., keys:] = -torch.inf
    states = []
    for garbage in (0.0, 6e4, -6e4):
        k[:, :, keys:], v[:, :, keys:] = garbage, garbage
        states.append(attend(q, k, v, mask=mask))
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])
