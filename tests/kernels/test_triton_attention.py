"""The attention kernels for CUDA in Triton's interpreter: against their float64 definition, and bit for bit.

What the product promises is bitwise: a state follows from its queries, keys and values alone. Interpreted, sizes are
small; bf16 is left to the GPU tests, since the interpreter rounds it differently.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.measures import relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.cuda.decode import decode_splits
from distkv.kernels.cuda.merge import AHEAD, STATES, carry_like, merge_splits
from distkv.kernels.cuda.prefill import BLOCK_M, SEGMENT_TOKENS, prefill_walk
from distkv.kernels.cuda.prefill_splits import prefill_splits
from distkv.kernels.cuda.softmax import States
from distkv.kernels.page_entries import buffer_entry
from distkv.storage.pools.host_memory import lazy_zeros

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

    @property
    def buffer_if_needed(self) -> Tensor | None:
        return self.buffer if bool((self.table < 0).any()) else None


def fill(layer_pool: Tensor, buffer: Tensor, tokens: list[Tensor], places: list[int], cold: float, seed: int) -> Pages:
    """Puts keys and values of each sequence, `[2, tokens, K, D]`, into pages, in the order of `places`.

    Each page lies in the buffer with probability `cold`.
    """
    page_size, generator = layer_pool.shape[3], seeded(seed)
    order, table, first_entry = iter(places), [], []
    for x in tokens:
        first_entry.append(len(table))
        for piece in x.split(page_size, dim=1) if x.shape[1] else ():
            place, is_cold = next(order), bool(torch.rand((), generator=generator) < cold)
            target = buffer[place] if is_cold else layer_pool[:, place]
            target[:, :, : piece.shape[1]] = piece.transpose(1, 2)
            table.append(buffer_entry(place) if is_cold else place)
    return Pages(layer_pool, buffer, torch.tensor(table or [0]), first_entry)


def lay_out(tokens: list[Tensor], page_size: int, cold: float, seed: int, garbage: float = GARBAGE) -> Pages:
    """Pages at random places of a layer of the pool and of the buffer; places without a token hold `garbage`."""
    _, _, kv_heads, head_dim = tokens[0].shape
    count = sum(-(-x.shape[1] // page_size) for x in tokens) + 2
    layer_pool = torch.full((3, 2, count, kv_heads, page_size, head_dim), garbage, dtype=tokens[0].dtype)[1]
    buffer = torch.full((count, 2, kv_heads, page_size, head_dim), garbage, dtype=tokens[0].dtype)
    return fill(layer_pool, buffer, tokens, torch.randperm(count, generator=seeded(seed)).tolist(), cold, seed)


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
    batch_invariant: bool = False

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

    def states(self, pages: Pages, *, num_programs: int = 3, seed: int | None = None) -> tuple[States, Tensor]:
        """States and `sequences`; items in an order drawn from `seed`."""
        kv_heads, _, head_dim = pages.layer_pool.shape[2:]
        first_state = [sum(self.num_states[:b]) for b in range(len(self.lengths))]
        sequences = torch.tensor(
            [
                (b * self.num_tokens, n, entry, state, 0, splits)
                for b, (n, entry, state, splits) in enumerate(
                    zip(self.lengths, pages.first_entry, first_state, self.num_states, strict=True)
                )
            ]
        ).reshape(-1, 6)
        items = torch.tensor([(b, s) for b, n in enumerate(self.num_states) for s in range(n)]).long().reshape(-1, 2)
        if seed is not None:
            items = items[torch.randperm(len(items), generator=seeded(seed))]
        # rows beyond num_items are left over from a larger step
        stale = torch.tensor([[10**9, 10**9]] * 2)
        shape = sum(self.num_states) + 1, kv_heads, self.num_tokens * self.group
        states = States(*(torch.full(one, math.nan) for one in ((*shape, head_dim), shape, shape)))
        decode_splits(
            self.q,
            pages.layer_pool,
            pages.buffer_if_needed,
            pages.table,
            sequences,
            torch.cat([items, stale]),
            torch.tensor([len(items)]),
            states,
            num_tokens=self.num_tokens,
            split_pages=self.split_pages,
            num_programs=num_programs,
            batch_invariant=self.batch_invariant,
        )
        assert all(part[-1].isnan().all() for part in states), "a state that is nobody's was written"
        return States(*(part[:-1] for part in states)), sequences

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
        batch_invariant=draw(st.booleans()),
    )


def merged(states: States) -> tuple[Tensor, Tensor]:
    """The definition of a merge, in float64 along the first dim: the result, and the log-sum-exp of the scores."""
    acc, m, total = (part.double() for part in states)
    weights = torch.exp2(m - m.amax(0))
    total = (total * weights).sum(0)
    return (acc * weights[..., None]).sum(0) / total[..., None], (m.amax(0) + total.log2()) * math.log(2)


def assert_decoded(batch: Decode, states: States, sequences: Tensor) -> None:
    """The states of each sequence, merged, are the attention over all its keys."""
    assert not any(part.isnan().any() for part in states)
    assert torch.equal(states.m, states.m.ceil())
    for b, first in enumerate(sequences[:, 3].tolist()):
        if batch.lengths[b]:
            mine = slice(first, first + batch.num_states[b])
            result, total = merged(States(*(part[mine] for part in states)))
            expected, expected_lse = batch.expected(b)
            rows = result.unflatten(1, (batch.num_tokens, batch.group)).transpose(0, 1).flatten(1, 2)
            total = total.unflatten(1, (batch.num_tokens, batch.group)).transpose(0, 1).flatten(1, 2)
            assert relative_error(rows, expected) < TOLERANCE[batch.q.dtype]
            assert relative_error(total, expected_lse) < TOLERANCE[batch.q.dtype]


def assert_equal(states: States, expected: States, name: str) -> None:
    assert all(torch.equal(part, wanted) for part, wanted in zip(states, expected, strict=True)), name


@few
@given(batch=decodes(), cold=st.sampled_from([0.0, 0.5, 1.0]), num_programs=st.integers(1, 9))
def test_decode(batch: Decode, cold: float, num_programs: int) -> None:
    assert_decoded(batch, *batch.states(batch.lay_out(cold), num_programs=num_programs, seed=batch.seed))


CORNERS = [
    Decode(torch.float16, 128, page_size=256, split_pages=1, kv_heads=1, group=4, num_tokens=1, lengths=[300, 256, 1]),
    Decode(torch.float16, 128, page_size=32, split_pages=4, kv_heads=1, group=16, num_tokens=8, lengths=[150, 8]),
    Decode(torch.float16, 96, page_size=512, split_pages=1, kv_heads=2, group=1, num_tokens=2, lengths=[2, 530, 0]),
    Decode(torch.float16, 64, page_size=16, split_pages=16, kv_heads=2, group=3, num_tokens=4, lengths=[270, 0, 5]),
    Decode(torch.float32, 80, page_size=16, split_pages=3, kv_heads=1, group=7, num_tokens=3, lengths=[100, 48]),
    Decode(torch.float32, 64, page_size=64, split_pages=2, kv_heads=1, group=16, num_tokens=5, lengths=[128, 129]),
]


@pytest.mark.parametrize("batch", CORNERS, ids=lambda batch: f"{batch.dtype}-{batch.head_dim}-{batch.page_size}")
def test_a_decode_state_is_bitwise_its_own(batch: Decode) -> None:
    """Wherever its pages lie and whatever else is in them, whoever is in the batch, whenever it is its turn."""
    for batch_invariant in (False, True):
        batch.batch_invariant = batch_invariant
        states, sequences = batch.states(batch.lay_out(0.0))
        assert_decoded(batch, states, sequences)
        same = {
            "in the buffer": batch.states(batch.lay_out(1.0, garbage=0.0)),
            "here and there": batch.states(batch.lay_out(0.5, seed=1, garbage=-GARBAGE)),
            "one program": batch.states(batch.lay_out(0.5, seed=2), num_programs=1, seed=3),
            "as many as items": batch.states(
                batch.lay_out(0.0, seed=4), num_programs=sum(batch.num_states) + 2, seed=5
            ),
        }
        for name, (other, _) in same.items():
            assert_equal(other, states, name)
        for b, (first, count) in enumerate(zip(sequences[:, 3].tolist(), batch.num_states, strict=True)):
            alone = replace(batch, lengths=batch.lengths[b : b + 1])
            alone.q = batch.q[b * batch.num_tokens : (b + 1) * batch.num_tokens]
            alone.tokens = batch.tokens[b : b + 1]
            other, _ = alone.states(alone.lay_out(0.5))
            assert_equal(other, States(*(part[first : first + count] for part in states)), "alone")


def test_decode_and_merge() -> None:
    """The two together, as a step calls them: rows of the result, and zeros for padding."""
    batch = Decode(torch.float16, 64, 16, split_pages=3, kv_heads=2, group=3, num_tokens=2, lengths=[100, 0, 5])
    states, sequences = batch.states(batch.lay_out(0.5))
    result = torch.full_like(batch.q, math.nan)
    merge_splits(states, sequences, result, None, num_tokens=batch.num_tokens, split_tokens=48)
    assert relative_error(result[:2], batch.expected(0)[0]) < TOLERANCE[batch.dtype]
    assert not result[2:4].any()
    assert relative_error(result[4:], batch.expected(2)[0]) < TOLERANCE[batch.dtype]


def test_a_row_that_sees_no_key_of_a_split() -> None:
    """The last split holds only the newest keys, which the first of the new tokens must not see."""
    batch = Decode(torch.float16, 64, 16, split_pages=2, kv_heads=1, group=2, num_tokens=8, lengths=[35])
    states, sequences = batch.states(batch.lay_out(0.0))
    assert_decoded(batch, states, sequences)
    blind = 5 * batch.group  # tokens 27..31
    assert torch.equal(states.m[1] == -math.inf, torch.arange(16)[None] < blind)
    assert not states.acc[1, :, :blind].any() and not states.total[1, :, :blind].any()


def test_no_items() -> None:
    batch = Decode(torch.float32, 64, 16, split_pages=1, kv_heads=1, group=1, num_tokens=1, lengths=[0, 0])
    assert not len(batch.states(batch.lay_out(0.0))[0].acc)


def test_nothing_beyond_the_keys_of_a_decode_is_read() -> None:
    """Not even multiplied by zero: what is no key of the sequence may be NaN."""
    batch = Decode(torch.float16, 80, 64, split_pages=1, kv_heads=1, group=2, num_tokens=1, lengths=[70, 3])
    states, _ = batch.states(batch.lay_out(0.5, garbage=math.nan))
    assert not any(part.isnan().any() for part in states)


@pytest.mark.parametrize(
    "num_states", [1, 2, STATES - 1, STATES, STATES + 1, 2 * STATES - 1, 2 * STATES, 2 * STATES + 9, AHEAD + 3]
)
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (80, torch.float32)])
def test_merge(num_states: int, head_dim: int, dtype: torch.dtype) -> None:
    """Against float64, for rows with empty states too; bitwise the same among others; zeros without a key."""
    kv_heads, num_tokens, group, split_tokens = 1, 2, 1, 48
    generator = seeded(num_states)
    acc = torch.randn(num_states, kv_heads, num_tokens * group, head_dim, generator=generator)
    m = (torch.randn(acc.shape[:3], generator=generator) * 5).ceil()
    states = States(acc, m, torch.rand(acc.shape[:3], generator=generator) + 0.5)
    if num_states > 1:
        for part, value in zip(states, (0.0, -math.inf, 0.0), strict=True):
            part[-1, :, 0] = value
    heads = kv_heads * group

    def result(before: int, keys: list[int]) -> Tensor:
        """Of the states behind `before` others."""
        around = States(
            *(
                torch.cat([torch.full((before, *part.shape[1:]), math.nan), part, torch.full_like(part, math.nan)])
                for part in states
            )
        )
        into = torch.full((num_tokens * len(keys), heads + 1, head_dim), math.nan, dtype=dtype)
        splits = [-(-n // split_tokens) for n in keys]
        sequences = torch.tensor([(b * num_tokens, n, 10**9, before, 0, splits[b]) for b, n in enumerate(keys)])
        merge_splits(around, sequences, into[:, :heads], None, num_tokens=num_tokens, split_tokens=split_tokens)
        assert into[:, heads:].isnan().all()
        return into[:, :heads]

    def in_launches(size: int) -> Tensor:
        """The states of each launch in memory that serves again, as in rounds of a long context."""
        into = torch.full((num_tokens, heads, head_dim), math.nan, dtype=dtype)
        carry = carry_like(into)
        for part in carry:
            part.fill_(math.nan)
        for first in range(0, num_states, size):
            end = min(first + size, num_states)
            sequences = torch.tensor([(0, num_states * split_tokens, 10**9, -first, first, end)])
            merge_splits(
                States(*(part[first:end].clone() for part in states)), sequences, into, carry, num_tokens=num_tokens,
                split_tokens=split_tokens,
            )  # fmt: skip
            assert into.isnan().all() or end == num_states, "the last launch alone writes the result"
        return into

    rows = result(0, [num_states * split_tokens])
    expected = merged(states)[0].unflatten(1, (num_tokens, group)).transpose(0, 1).flatten(1, 2)
    assert relative_error(rows, expected) < TOLERANCE[dtype]
    among = result(3, [0, (num_states - 1) * split_tokens + 1])
    assert not among[:num_tokens].any()
    assert torch.equal(among[num_tokens:], rows)
    for size in (STATES, 2 * STATES, 2 * STATES + 3, 7):
        assert torch.equal(in_launches(size), rows)


def test_where_a_merge_is_cut_changes_no_sign_of_a_zero() -> None:
    """Of a negative sum that later scores leave nothing of, while all that is added to it is -0."""
    num_states = 1 + STATES
    states = States(torch.full((num_states, 1, 1, 64), -0.0), *torch.ones(2, num_states, 1, 1))
    states.acc[0], states.m[1:] = -1.0, 200.0

    def signs(*borders: int) -> Tensor:
        into = torch.full((1, 1, 64), math.nan)
        carry = carry_like(into)
        for launch in pairwise(borders):
            sequences = torch.tensor([(0, num_states * 48, 0, 0, *launch)])
            merge_splits(states, sequences, into, carry, num_tokens=1, split_tokens=48)
        assert not into.any()
        return into.signbit()

    at_once = signs(0, num_states)
    assert torch.equal(signs(0, 1, num_states), at_once)
    assert torch.equal(signs(0, 1, 9, num_states), at_once)


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
    split_tokens: int | None = None

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
        state = States(*(torch.full(s, math.nan) for s in ((rows, num_heads, head_dim), *[(rows, num_heads)] * 2)))
        for launch in range(max(map(len, borders)) - 1):
            chunks, blocks, first_row = [], [], 0
            for c, (prefix, count) in enumerate(zip(self.prefixes, self.counts, strict=True)):
                if launch + 1 < len(borders[c]):
                    start, end = borders[c][launch : launch + 2]
                    first_state = first_row + gap * (c + 1)
                    blocks += [(len(chunks), row) for row in range(0, count * self.group, BLOCK_M)]
                    chunks.append((first_row, count, prefix, pages.first_entry[c], start, end, first_state, 0))
                first_row += count
            if spread:
                blocks.sort(key=lambda block: (block[1], block[0]))
            walk = prefill_walk
            if self.split_tokens is not None:
                walk = partial(prefill_splits, split_tokens=self.split_tokens)
            walk(
                self.q,
                pages.layer_pool,
                pages.buffer_if_needed,
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
    split_tokens = draw(st.sampled_from([None, 128, 256]))
    unit, cuts = max(split_tokens or SEGMENT_TOKENS, page_size), []
    for prefix, count in zip(prefixes, counts, strict=True):
        possible = list(range(unit, prefix + count, unit))
        cuts.append(sorted(draw(st.sets(st.sampled_from(possible)))) if possible else [])
    kv_heads = draw(st.integers(1, 2))
    shape = draw(dtypes), draw(head_dims), page_size, kv_heads, group
    split_tokens = split_tokens and max(split_tokens, page_size)
    return Prefill(*shape, prefixes, counts, cuts, draw(seeds), split_tokens)


PREFILL_CORNERS = {
    "blocks that end in an earlier segment": Prefill(torch.float16, 64, 16, 1, 1, [0], [300], [[128, 256]]),
    "a block whose walk is one token": Prefill(torch.float16, 96, 32, 2, 16, [0, 130], [9, 1], [[], [128]]),
    "pages larger than a segment": Prefill(torch.float16, 128, 512, 1, 4, [1000], [40], [[512]]),
    "a chunk of one token on a border": Prefill(torch.float16, 80, 128, 1, 3, [255, 256], [1, 1], [[128], [128, 256]]),
    "fp32": Prefill(torch.float32, 80, 16, 1, 5, [120, 0], [30, 40], [[128], []]),
    "splits": Prefill(torch.float16, 64, 16, 2, 3, [300, 0], [40, 130], [[256], [128]], split_tokens=128),
    "splits in fp32": Prefill(torch.float32, 80, 128, 1, 5, [120, 0], [30, 40], [[128], []], split_tokens=128),
}


@pytest.mark.parametrize("batch", PREFILL_CORNERS.values(), ids=PREFILL_CORNERS.keys())
def test_prefill_is_bitwise_its_own(batch: Prefill) -> None:
    """However the walk is cut, wherever pages lie and whatever else is in them, whichever chunks are in the launch."""
    whole = [[] for _ in batch.cuts]
    out = batch.out(batch.lay_out(0.0), whole)
    batch.assert_close(out)
    assert torch.equal(batch.out(batch.lay_out(0.0, seed=1), batch.cuts), out), "cut"
    assert torch.equal(batch.out(batch.lay_out(1.0, seed=2, garbage=-GARBAGE), whole, spread=True), out), (
        "in the buffer"
    )
    assert torch.equal(batch.out(batch.lay_out(0.5, seed=3, garbage=0.0), batch.cuts, spread=True), out), "both"
    for c, rows in enumerate(out.split(batch.counts)):
        alone = replace(batch, **{name: getattr(batch, name)[c : c + 1] for name in ("prefixes", "counts", "cuts")})
        alone.q, alone.tokens = batch.q.split(batch.counts)[c], batch.tokens[c : c + 1]
        assert torch.equal(alone.out(alone.lay_out(0.5), alone.cuts), rows), "alone"


@pytest.mark.parametrize(
    "dtype, head_dim, group", [(torch.float16, 64, 3), (torch.float32, 16, 1), (torch.float16, 16, 9)]
)
def test_decode_and_prefill_agree_in_every_bit(dtype: torch.dtype, head_dim: int, group: int) -> None:
    """The last rows of a sequence, in chunks of any size: as one of the first kind, as up to eight, and as a prompt."""
    page_size, split_tokens, length, count = 16, 128, 270, 48
    tokens = random_tokens([length], 1, head_dim, dtype, 5)
    q = random_queries(count, 1, group, head_dim, dtype, 6)

    def chunk(first: int, size: int) -> Tensor:
        """Rows `first .. first + size` of q, with no key behind them."""
        keys = length - count + first + size
        if size > 8:
            walk = Prefill(dtype, head_dim, page_size, 1, group, [keys - size], [size], [[]], 0, split_tokens)
            walk.q, walk.tokens = q[first : first + size], [tokens[0][:, :keys]]
            return walk.out(walk.lay_out(0.5, seed=size), [[split_tokens]])
        batch = Decode(dtype, head_dim, page_size, 8, 1, group, size, [keys], 0, batch_invariant=True)
        batch.q, batch.tokens = q[first : first + size], [tokens[0][:, :keys]]
        states, sequences = batch.states(batch.lay_out(0.5, seed=size))
        result = torch.full_like(batch.q, math.nan)
        merge_splits(states, sequences, result, None, num_tokens=size, split_tokens=split_tokens)
        return result

    whole = chunk(0, count)
    for first, size in ((47, 1), (0, 1), (30, 2), (9, 7), (40, 8), (32, 16), (3, 33)):
        assert torch.equal(chunk(first, size), whole[first : first + size]), f"{size} from {first}"


def test_no_blocks() -> None:
    batch = Prefill(torch.float32, 64, 16, 1, 1, [16], [0], [[]])
    assert batch.out(batch.lay_out(0.0), [[]]).shape[0] == 0


def test_pages_that_sequences_share() -> None:
    """Two sequences with the first two pages in common, one of them cold."""
    shared, own = random_tokens([32, 20], 1, 64, torch.float16, 1)
    both = [torch.cat([shared, own[:, :n]], dim=1) for n in (20, 9)]
    apart = lay_out(both, 16, 0.0, 0)
    pages = lay_out([shared, own, own[:, :9]], 16, 0.5, 1)
    first = pages.table.tolist()
    pages.table, pages.first_entry = torch.tensor(first[:4] + first[:2] + first[4:]), [0, 4]
    assert min(first[:2]) < 0 <= max(first[:2])

    decode = Decode(torch.float16, 64, 16, 2, 1, group=2, num_tokens=1, lengths=[52, 41])
    prefill = Prefill(torch.float16, 64, 16, 1, 2, [45, 38], [7, 3], [[], []])
    assert_equal(decode.states(pages)[0], decode.states(apart)[0], "shared")
    assert torch.equal(prefill.out(pages, prefill.cuts), prefill.out(apart, prefill.cuts))


def test_pools_beyond_two_to_the_31_elements() -> None:
    """The pages lie at the far end of a pool and of a buffer, of which the system maps nothing else."""
    head_dim, page_size = 64, 16
    places = 2**31 // (page_size * head_dim) + 4
    layer_pool = lazy_zeros((2, places, 1, page_size, head_dim), torch.float16)
    buffer = lazy_zeros((places // 2 + 4, 2, 1, page_size, head_dim), torch.float16)
    decode = Decode(torch.float16, head_dim, page_size, 2, 1, group=2, num_tokens=1, lengths=[70])
    prefill = Prefill(torch.float16, head_dim, page_size, 1, 2, [50], [20], [[]])
    for batch in (decode, prefill):
        near = batch.lay_out(0.0)
        for cold, last in ((0.0, places), (1.0, len(buffer))):
            far = fill(layer_pool, buffer, batch.tokens, list(range(last - 5, last)), cold, 0)
            if isinstance(batch, Decode):
                assert_equal(batch.states(far)[0], batch.states(near)[0], "far")
            else:
                assert torch.equal(batch.out(far, [[]]), batch.out(near, [[]]))


@pytest.mark.parametrize("wrong", ["pool", "buffer"])
def test_layouts_that_the_kernels_do_not_read_are_refused(wrong: str) -> None:
    batch = Decode(torch.float16, 64, 16, 1, 1, group=1, num_tokens=1, lengths=[20])
    pages = batch.lay_out(1.0)
    if wrong == "pool":
        pages.layer_pool = pages.layer_pool.transpose(3, 4).contiguous().transpose(3, 4)
    else:
        pages.buffer = pages.buffer.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        batch.states(pages)


@few
@given(batch=prefills(), cold=st.sampled_from([0.0, 0.5, 1.0]))
def test_prefill(batch: Prefill, cold: float) -> None:
    """Any chunks in a launch, whole or cut, resident or not: right, and bitwise the same."""
    out = batch.out(batch.lay_out(0.0), [[] for _ in batch.cuts])
    batch.assert_close(out)
    elsewhere = batch.lay_out(cold, seed=1, garbage=-GARBAGE)
    assert torch.equal(batch.out(elsewhere, batch.cuts, spread=True), out)
