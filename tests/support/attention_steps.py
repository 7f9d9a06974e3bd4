"""The attention of a step over pages that lie anywhere, beside what it should be."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from support.measures import TOLERANCE, relative_error
from support.pages import store
from support.plans import sequence_step
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.native.library import load_best
from distkv.storage.device import CpuDevice
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention.cpu import CpuAttention, plan_cpu_attention
from distkv.workers.attention.native import NativeAttention, plan_native_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import Attention, step_tokens

BUFFER_PAGES = 4


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step and the shape of the model, without a place for their pages yet."""

    lengths: list[tuple[int, int]]  # (tokens before the step, new tokens) of each sequence
    shared: list[int]  # the first pages that each sequence has in common with the one before, at most
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0
    pages: list[list[int]] = field(init=False)  # of each sequence, as numbers 0 .. num_pages - 1
    num_pages: int = field(init=False)

    def __post_init__(self) -> None:
        pages: list[list[int]] = []
        taken = 0
        for index, (start, count) in enumerate(self.lengths):
            common: list[int] = []
            if index:
                # only full pages that neither sequence writes in this step
                full = min(start, self.lengths[index - 1][0]) // self.page_size
                common = pages[-1][: min(full, self.shared[index])]
            own = -(-(start + count) // self.page_size) - len(common)
            pages.append(common + list(range(taken, taken + own)))
            taken += own
        object.__setattr__(self, "pages", pages)
        object.__setattr__(self, "num_pages", taken)


PlanAttention = Callable[[list[SequenceStep], Sequences], Attention]


def plan_on_cpu(steps: list[SequenceStep], s: Sequences) -> CpuAttention:
    return plan_cpu_attention(steps, s.page_size, s.group, BUFFER_PAGES, s.dtype)


def plan_natively(steps: list[SequenceStep], s: Sequences) -> NativeAttention:
    return plan_native_attention(load_best(), steps, s.page_size, BUFFER_PAGES)


@dataclass(frozen=True)
class Step:
    """A step whose pages have found their slots in a pool."""

    sequences: Sequences
    tables: list[list[int]]
    pool: Tensor  # [2, slots, K, S, D]
    steps: list[SequenceStep]
    q: Tensor  # [T, H, D]

    def attend(self, plan: PlanAttention = plan_on_cpu) -> Tensor:
        """Attention of the step: `[T, H * D]`."""
        return plan(self.steps, self.sequences).attend(self.q, *self.new_kv(self.pool), self.pool, None)

    def new_kv(self, pool: Tensor) -> Tensor:
        """Keys and values of the new tokens: `[2, T, K, D]`."""
        tokens = step_tokens(self.steps, self.sequences.page_size)
        page, offset = torch.from_numpy(tokens.page), torch.from_numpy(tokens.offset)
        return torch.stack([pool[0][page, :, offset], pool[1][page, :, offset]])

    def attend_with_cold(self, cold: set[int], plan: PlanAttention = plan_on_cpu) -> Tensor:
        """The same with the given page numbers in a host pool; their device slots hold large numbers."""
        s = self.sequences
        spec = PageSpec(1, s.kv_heads, s.page_size, s.head_dim, str(s.dtype).removeprefix("torch."))
        host = HostPool(spec, 2 * s.num_pages, pinned=False)
        pool, places = self.pool.clone(), {}
        shuffled = torch.randperm(2 * s.num_pages, generator=seeded(s.seed)).tolist()
        for pages, slots in zip(s.pages, self.tables, strict=True):
            for page, slot in zip(pages, slots, strict=True):
                if page in cold:
                    places[slot] = encode_location(Tier.HOST, shuffled[page])
                    store(host, shuffled[page], self.pool[:, slot].contiguous()[None])
                    pool[:, slot] = 6e4
        parts = [
            sequence_step(one.token_ids, one.start, [places.get(p, p) for p in one.pages.tolist()], one.prompt_len, 1)
            for one in self.steps
        ]
        attention = plan(parts, s)
        ring = StagingRing(spec, NUM_BUFFERS * 32, host, None, None, CpuDevice())
        loads = attention.loads
        if not loads:
            return attention.attend(self.q, *self.new_kv(pool), pool, None)
        stream = ring.begin(loads)
        out = attention.attend(self.q, *self.new_kv(pool), pool, stream)
        stream.close()
        # each group of the step brings a page once, however many of its sequences share it
        assert ring.bytes == {Tier.HOST: sum(len(load) for load in loads) * spec.layer_slice_bytes}
        assert {place for load in loads for place in load} == set(places.values())
        return out

    def expected(self) -> list[tuple[slice, Tensor]]:
        """For each sequence its rows of the step and their attention, `[tokens, H * D]` in float64."""
        expected, first = [], 0
        for (start, count), table in zip(self.sequences.lengths, self.tables, strict=True):
            rows = slice(first, first + count)
            keys, values = reference.read_pages(self.pool, table, start + count)
            out, _ = reference.attention(self.q[rows].unflatten(1, (self.sequences.kv_heads, -1)), keys, values)
            expected.append((rows, out.flatten(1)))
            first += count
        return expected

    def assert_right(self, plan: PlanAttention = plan_on_cpu) -> None:
        result = self.attend(plan)
        assert result.dtype == self.sequences.dtype
        for index, (rows, out) in enumerate(self.expected()):
            error = relative_error(result[rows], out)
            assert error < TOLERANCE[self.sequences.dtype], f"sequence {index}: {error}"


def place(sequences: Sequences, slots: list[int], garbage: float = 6e4) -> Step:
    """Puts the pages into the given slots, one for each page number; every place without a token holds `garbage`."""
    s, generator = sequences, seeded(sequences.seed)
    content = (torch.randn(2, s.num_pages, s.kv_heads, s.page_size, s.head_dim, generator=generator) * 1.5).to(s.dtype)
    filled = torch.zeros(s.num_pages, s.page_size, dtype=torch.bool)
    for (start, count), pages in zip(s.lengths, s.pages, strict=True):
        *full, last = pages
        filled[full] = True
        filled[last, : start + count - len(full) * s.page_size] = True
    content.masked_fill_(~filled[None, :, None, :, None], garbage)
    pool = torch.full((2, max(slots) + 2, s.kv_heads, s.page_size, s.head_dim), garbage, dtype=s.dtype)
    pool[:, slots] = content

    tables = [[slots[page] for page in pages] for pages in s.pages]
    tokens = sum(count for _, count in s.lengths)
    plans = [
        sequence_step([7] * count, start, table, start + count, 1)
        for (start, count), table in zip(s.lengths, tables, strict=True)
    ]
    # queries are a view of queries and keys side by side, as in the model
    rotated = torch.randn(tokens, s.kv_heads * (s.group + 1), s.head_dim, generator=generator).to(s.dtype)
    return Step(s, tables, pool, plans, rotated[:, : s.kv_heads * s.group])


@st.composite
def slots_for(draw: st.DrawFn, num_pages: int) -> list[int]:
    """Distinct slots: neighbours, backwards, or scattered with gaps."""
    arrangement = draw(st.sampled_from(["in order", "reversed", "scattered"]))
    slots = list(range(1, num_pages + 1))
    if arrangement == "reversed":
        return slots[::-1]
    if arrangement == "scattered":
        return draw(st.permutations(range(num_pages + 4)))[:num_pages]
    return slots
