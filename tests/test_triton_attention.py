"""The attention kernels for CUDA in Triton's interpreter: against their float64 definition, and bit for bit.

What the product promises is bitwise: a state follows from its queries, keys and values alone. Interpreted, sizes are
small; bf16 is left to the GPU tests, since the interpreter rounds it differently.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from helpers import relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.cuda.decode import decode_splits
from distkv.kernels.cuda.prefill import BLOCK_M, SEGMENT_TOKENS, PrefillState, num_blocks, prefill_walk

pytestmark = pytest.mark.interpreter

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
"""Largest relative error in the Euclidean norm."""
GARBAGE = 6e4
"""What places without a token hold: large, but finite in fp16."""

dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**32 - 1)
head_dims = st.sampled_from([64, 80, 96, 128])
page_sizes = st.sampled_from([16, 32, 64, 128, 256, 512])
few = settings(max_examples=15)


@dataclass
class Pages:
    """Tokens in pages: what the kernels are given of it, and where the entries of each sequence begin."""

    layer_pool: Tensor
    buffer: Tensor
    table: Tensor
    first_entry: list[int]


def lay_out(tokens: list[Tensor], page_size: int, cold: float, seed: int, garbage: float = GARBAGE) -> Pages:
    """Puts keys and values of each sequence, `[2, tokens, K, D]`, into pages at random places of pool and buffer.

    A page lies in the buffer with probability `cold`. Places without a token hold `garbage`.
    """
    _, _, kv_heads, head_dim = tokens[0].shape
    counts = [-(-x.shape[1] // page_size) for x in tokens]
    generator, places = seeded(seed), sum(counts) + 2
    order = torch.randperm(places, generator=generator).tolist()
    block = (kv_heads, page_size, head_dim)
    layer_pool = torch.full((3, 2, places, *block), garbage, dtype=tokens[0].dtype)[1]
    buffer = torch.full((places, 2, *block), garbage, dtype=tokens[0].dtype)
    table, first_entry = [], []
    for x, count in zip(tokens, counts, strict=True):
        first_entry.append(len(table))
        for page in range(count):
            place, is_cold = order.pop(), bool(torch.rand((), generator=generator) < cold)
            target = buffer[place] if is_cold else layer_pool[:, place]
            piece = x[:, page * page_size : (page + 1) * page_size].transpose(1, 2)
            target[:, :, : piece.shape[2]] = piece
            table.append(-1 - place if is_cold else place)
    return Pages(layer_pool, buffer, torch.tensor(table or [0]), first_entry)


def random_tokens(lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Keys and values `[2, tokens, K, D]` of each sequence."""
    generator = seeded(seed)
    return [(torch.randn(2, n, kv_heads, head_dim, generator=generator) * 1.5).to(dtype) for n in lengths]


def random_queries(count: int, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A view `[count, H, D]` of a fused projection, as in the model."""
    heads = kv_heads * group
    return torch.randn(count, heads + 2 * kv_heads, head_dim, generator=seeded(seed)).to(dtype)[:, :heads]


@dataclass
class Decode:
    """A decode batch: the new tokens of each sequence are its last; one of length 0 is padding."""

    dtype: torch.dtype
    head_dim: int
    page_size: int
    split_pages: int
    kv_heads: int
    group: int
    num_tokens: int
    lengths: list[int]
    seed: int = 0

    @cached_property
    def q(self) -> Tensor:
        count = len(self.lengths) * self.num_tokens
        return random_queries(count, self.kv_heads, self.group, self.head_dim, self.dtype, self.seed)

    @cached_property
    def tokens(self) -> list[Tensor]:
        return random_tokens(self.lengths, self.kv_heads, self.head_dim, self.dtype, self.seed + 1)

    def lay_out(self, cold: float, seed: int = 0, garbage: float = GARBAGE) -> Pages:
        return lay_out(self.tokens, self.page_size, cold, seed, garbage)

    @property
    def num_states(self) -> list[int]:
        return [-(-n // (self.page_size * self.split_pages)) for n in self.lengths]

    def states(self, pages: Pages, *, num_programs: int = 3, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and `sequences`; items in an order drawn from `seed`."""
        kv_heads, _, head_dim = pages.layer_pool.shape[2:]
        first_state = [sum(self.num_states[:b]) for b in range(len(self.lengths))]
        sequences = torch.tensor(
            [
                (b * self.num_tokens, n, entry, state)
                for b, (n, entry, state) in enumerate(zip(self.lengths, pages.first_entry, first_state, strict=True))
            ]
        ).reshape(-1, 4)
        items = torch.tensor([(b, s) for b, n in enumerate(self.num_states) for s in range(n)]).long().reshape(-1, 2)
        if seed is not None:
            items = items[torch.randperm(len(items), generator=seeded(seed))]
        # rows beyond num_items are left over from a larger step
        stale = torch.tensor([[10**9, 10**9]] * 2)
        rows = self.num_tokens * self.group
        out = torch.full((sum(self.num_states) + 1, kv_heads, rows, head_dim), math.nan)
        lse = torch.full(out.shape[:3], math.nan)
        decode_splits(
            self.q,
            pages.layer_pool,
            pages.buffer if bool((pages.table < 0).any()) else None,
            pages.table,
            sequences,
            torch.cat([items, stale]),
            torch.tensor([len(items)]),
            out,
            lse,
            num_tokens=self.num_tokens,
            split_pages=self.split_pages,
            num_programs=num_programs,
        )
        assert out[-1].isnan().all() and lse[-1].isnan().all(), "a state that is nobody's was written"
        return out[:-1], lse[:-1], sequences

    def expected(self, b: int) -> tuple[Tensor, Tensor]:
        """Of sequence b: float64 out `[C, H, D]` and lse `[C, H]`."""
        q = self.q[b * self.num_tokens : (b + 1) * self.num_tokens].unflatten(1, (-1, self.group))
        out, lse = reference.attention(q, *self.tokens[b])
        return out.flatten(1, 2), lse.flatten(1, 2)


@st.composite
def decodes(draw: st.DrawFn) -> Decode:
    page_size, num_tokens = draw(page_sizes), draw(st.integers(1, 8))
    length = st.one_of(st.just(0), st.integers(num_tokens, 40), st.integers(num_tokens, 300))
    return Decode(
        draw(dtypes),
        draw(head_dims),
        page_size,
        split_pages=draw(st.integers(1, max(1, 256 // page_size))),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 16)),
        num_tokens=num_tokens,
        lengths=draw(st.lists(length, min_size=1, max_size=3)),
        seed=draw(seeds),
    )


def merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of a merge, in float64 along the first dim."""
    total = torch.logsumexp(lse.double(), 0)
    return (out.double() * torch.exp(lse.double() - total)[..., None]).sum(0), total


def assert_decoded(batch: Decode, states: tuple[Tensor, Tensor, Tensor]) -> None:
    """The states of each sequence, merged, are the attention over all its keys."""
    out, lse, sequences = states
    assert not out.isnan().any() and not lse.isnan().any()
    for b, first in enumerate(sequences[:, 3].tolist()):
        if batch.lengths[b]:
            mine = slice(first, first + batch.num_states[b])
            result, total = merged(out[mine], lse[mine])
            expected, expected_lse = batch.expected(b)
            rows = result.unflatten(1, (batch.num_tokens, batch.group)).transpose(0, 1).flatten(1, 2)
            total = total.unflatten(1, (batch.num_tokens, batch.group)).transpose(0, 1).flatten(1, 2)
            assert relative_error(rows, expected) < TOLERANCE[batch.q.dtype]
            assert relative_error(total, expected_lse) < TOLERANCE[batch.q.dtype]


@few
@given(batch=decodes(), cold=st.sampled_from([0.0, 0.5, 1.0]), num_programs=st.integers(1, 9))
def test_decode(batch: Decode, cold: float, num_programs: int) -> None:
    assert_decoded(batch, batch.states(batch.lay_out(cold), num_programs=num_programs, seed=batch.seed))


@dataclass
class Prefill:
    """Chunks of prompts, each behind a prefix of its own, and where to cut their walks."""

    dtype: torch.dtype
    head_dim: int
    page_size: int
    kv_heads: int
    group: int
    prefixes: list[int]
    counts: list[int]
    cuts: list[list[int]]
    seed: int = 0

    @cached_property
    def q(self) -> Tensor:
        return random_queries(sum(self.counts), self.kv_heads, self.group, self.head_dim, self.dtype, self.seed)

    @cached_property
    def tokens(self) -> list[Tensor]:
        lengths = [prefix + count for prefix, count in zip(self.prefixes, self.counts, strict=True)]
        return random_tokens(lengths, self.kv_heads, self.head_dim, self.dtype, self.seed + 1)

    def lay_out(self, cold: float, seed: int = 0, garbage: float = GARBAGE) -> Pages:
        return lay_out(self.tokens, self.page_size, cold, seed, garbage)

    def out(self, pages: Pages, cuts: list[list[int]], *, spread: bool = False) -> Tensor:
        """The walk of each chunk cut at the keys in `cuts`, one launch for all first segments, and so on.

        `spread` puts the chunks' blocks of a launch in turns, and their saved states apart.
        """
        num_heads, head_dim = self.q.shape[1:]
        ends = [prefix + count for prefix, count in zip(self.prefixes, self.counts, strict=True)]
        borders = [[0, *cut, end] for cut, end in zip(cuts, ends, strict=True)]
        out = torch.full((len(self.q), num_heads + 1, head_dim), math.nan, dtype=self.q.dtype)[:, :num_heads]
        gap = 5 if spread else 0
        rows = len(self.q) + gap * len(cuts)
        state = PrefillState(
            *(torch.full(s, math.nan) for s in ((rows, num_heads, head_dim), *[(rows, num_heads)] * 2))
        )
        for launch in range(max(map(len, borders)) - 1):
            chunks, blocks, first_row = [], [], 0
            for c, (prefix, count) in enumerate(zip(self.prefixes, self.counts, strict=True)):
                if launch + 1 < len(borders[c]):
                    start, end = borders[c][launch : launch + 2]
                    first_state = first_row + gap * (c + 1)
                    blocks += [(len(chunks), b * BLOCK_M) for b in range(num_blocks(count, self.group))]
                    chunks.append((first_row, count, prefix, pages.first_entry[c], start, end, first_state, 0))
                first_row += count
            if spread:
                blocks.sort(key=lambda block: (block[1], block[0]))
            prefill_walk(
                self.q,
                pages.layer_pool,
                pages.buffer if bool((pages.table < 0).any()) else None,
                pages.table,
                torch.tensor(chunks).reshape(-1, 8),
                torch.tensor(blocks).reshape(-1, 2),
                state if any(cuts) else None,
                out,
            )
        return out

    def assert_close(self, out: Tensor) -> None:
        assert not out.isnan().any()
        for rows, q, x in zip(out.split(self.counts), self.q.split(self.counts), self.tokens, strict=True):
            if len(rows):
                expected, _ = reference.attention(q.unflatten(1, (-1, self.group)), *x)
                assert relative_error(rows, expected.flatten(1, 2)) < TOLERANCE[self.q.dtype]


@st.composite
def prefills(draw: st.DrawFn) -> Prefill:
    page_size, group = draw(page_sizes), draw(st.integers(1, 16))
    prefixes = draw(st.lists(st.one_of(st.just(0), st.integers(1, 400)), min_size=1, max_size=2))
    counts = [draw(st.one_of(st.integers(1, 9), st.integers(1, 280 // group))) for _ in prefixes]
    unit, cuts = max(SEGMENT_TOKENS, page_size), []
    for prefix, count in zip(prefixes, counts, strict=True):
        possible = list(range(unit, prefix + count, unit))
        cuts.append(sorted(draw(st.sets(st.sampled_from(possible)))) if possible else [])
    kv_heads = draw(st.integers(1, 2))
    return Prefill(draw(dtypes), draw(head_dims), page_size, kv_heads, group, prefixes, counts, cuts, draw(seeds))


@few
@given(batch=prefills(), cold=st.sampled_from([0.0, 0.5, 1.0]))
def test_prefill(batch: Prefill, cold: float) -> None:
    """Any chunks in a launch, whole or cut, resident or not: right, and bitwise the same."""
    out = batch.out(batch.lay_out(0.0), [[] for _ in batch.cuts])
    batch.assert_close(out)
    elsewhere = batch.lay_out(cold, seed=1, garbage=-GARBAGE)
    assert torch.equal(batch.out(elsewhere, batch.cuts, spread=True), out)
