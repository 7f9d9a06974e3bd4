"""The attention kernels for CUDA in Triton's interpreter: against their float64 definition, and bit for bit.

What the product promises is bitwise: a state follows from its queries, keys and values alone. Interpreted, sizes are
small; bf16 is left to the GPU tests, since the interpreter rounds it differently.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from helpers import relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.cuda.decode import decode_splits
from distkv.kernels.cuda.merge import STATES, merge_splits
from distkv.storage.host_memory import lazy_zeros

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

    q: Tensor
    num_tokens: int
    group: int
    page_size: int
    split_pages: int
    lengths: list[int]

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

    def result(self, out: Tensor, lse: Tensor, sequences: Tensor) -> Tensor:
        result = torch.full_like(self.q, math.nan)
        split_tokens = self.split_pages * self.page_size
        merge_splits(out, lse, sequences, result, num_tokens=self.num_tokens, split_tokens=split_tokens)
        return result

    def expected(self, b: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of sequence b: float64 out `[C, H, D]` and lse `[C, H]`."""
        q = self.q[b * self.num_tokens : (b + 1) * self.num_tokens].unflatten(1, (-1, self.group))
        out, lse = reference.attention(q, *tokens)
        return out.flatten(1, 2), lse.flatten(1, 2)


@st.composite
def decodes(draw: st.DrawFn) -> tuple[Decode, list[Tensor], int]:
    """A batch, the tokens of its sequences, and a seed."""
    dtype, head_dim, page_size, seed = draw(dtypes), draw(head_dims), draw(page_sizes), draw(seeds)
    num_tokens = draw(st.integers(1, 8))
    group = draw(st.integers(1, 16))
    kv_heads = draw(st.integers(1, 2))
    split_pages = draw(st.integers(1, max(1, 256 // page_size)))
    length = st.one_of(st.just(0), st.integers(num_tokens, num_tokens + 40), st.integers(num_tokens, 600))
    lengths = draw(st.lists(length, min_size=1, max_size=3))
    q = random_queries(len(lengths) * num_tokens, kv_heads, group, head_dim, dtype, seed)
    tokens = random_tokens(lengths, kv_heads, head_dim, dtype, seed + 1)
    return Decode(q, num_tokens, group, page_size, split_pages, lengths), tokens, seed


@few
@given(drawn=decodes(), cold=st.sampled_from([0.0, 0.5, 1.0]), num_programs=st.integers(1, 9))
def test_decode(drawn: tuple[Decode, list[Tensor], int], cold: float, num_programs: int) -> None:
    batch, tokens, seed = drawn
    pages = lay_out(tokens, batch.page_size, cold, seed)
    out, lse, sequences = batch.states(pages, num_programs=num_programs, seed=seed)
    assert not out.isnan().any() and not lse.isnan().any()
    result = batch.result(out, lse, sequences)
    limit = TOLERANCE[batch.q.dtype]
    lse = lse.unflatten(2, (batch.num_tokens, batch.group))
    for b, first in enumerate(sequences[:, 3].tolist()):
        rows = result[b * batch.num_tokens : (b + 1) * batch.num_tokens]
        if batch.lengths[b] == 0:
            assert torch.equal(rows, torch.zeros_like(rows))
            continue
        expected, expected_lse = batch.expected(b, tokens[b])
        assert relative_error(rows, expected) < limit
        whole = torch.logsumexp(lse[first : first + batch.num_states[b]].double(), 0)
        assert relative_error(whole.transpose(0, 1).flatten(1), expected_lse) < limit
