"""Attention over pages that several ranks share out: bit for bit that of one rank that has all of them.

The ranks are threads here.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from support.attention_steps import BUFFER_PAGES, Sequences, Step, place
from support.thread_group import join_in_threads
from torch import Tensor

from distkv.kernels.codec_format import FORMATS
from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import load_best
from distkv.storage.device import CpuDevice
from distkv.storage.moving.staging_ring import StagingRing, Stream
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention import context_attention
from distkv.workers.attention.context_attention import ContextGroup, plan_context_attention
from distkv.workers.attention.native import plan_native_attention
from distkv.workers.backends.cpu import CpuBackend
from distkv.workers.errors import ConfigError
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.page_directory import SequenceStep

PAGE_SIZE = 16  # of a rank


@dataclass(frozen=True)
class Shape:
    """Heads of a group of ranks."""

    kv_heads: int
    group: int
    query_heads: list[tuple[int, int]]
    kv_heads_of: list[tuple[int, int]]

    @property
    def size(self) -> int:
        return len(self.query_heads)


SHAPES = {
    "2 ranks of 1 KV head": Shape(1, 3, [(0, 2), (2, 3)], [(0, 1), (0, 1)]),
    "2 ranks of 3 KV heads": Shape(3, 3, [(0, 6), (6, 9)], [(0, 2), (2, 3)]),
    "3 ranks of 1 KV head": Shape(1, 4, [(0, 2), (2, 3), (3, 4)], [(0, 1), (0, 1), (0, 1)]),
}
# tokens before the step and in it: prompts that begin, go on and end anywhere in a page, and answers
LENGTHS = [
    [(0, 100), (130, 1), (64, 33), (200, 7)],
    [(31, 1), (32, 1), (47, 8), (500, 2)],
    [(250, 60), (250, 1), (96, 300)],
]


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few pages, so that there are many of them."""
    monkeypatch.setattr(context_attention, "STATE_BYTES", 12000)
    monkeypatch.setattr(context_attention, "PAGE_BYTES", 40000)


def round_full(codec: NativeCodec, pool: Tensor, steps: list[SequenceStep]) -> None:
    """What was full before the step has been rounded."""
    full = {slot for one in steps for slot in one.pages[: one.start // PAGE_SIZE].tolist()}
    codec.round(pool, torch.tensor(sorted(full), dtype=torch.int64))


def by_pages_of_ranks(step: Step, size: int) -> Step:
    """The same step over pages of PAGE_SIZE tokens: those of a larger one lie side by side."""
    pool = step.pool.unflatten(3, (size, PAGE_SIZE)).movedim(3, 2).flatten(1, 2).contiguous()
    steps = []
    for one in step.steps:
        pages = (one.pages[:, None] * size + torch.arange(size).numpy()).reshape(-1)
        steps.append(replace(one, pages=pages[: -(-(one.start + len(one.token_ids)) // PAGE_SIZE)]))
    return replace(step, pool=pool, steps=steps)


join_once = cache(join_in_threads)


@contextmanager
def streaming(ring: StagingRing, loads: Any) -> Iterator[Stream | None]:
    stream = ring.begin(loads) if loads else None
    yield stream
    if stream is not None:
        stream.close()


def attend_on_ranks(step: Step, whole: Tensor, shape: Shape, cold: set[int], codec_name: str) -> Tensor:
    """The attention of a step on all ranks, side by side; `whole` has the pages of ranks side by side, and those of the
    leader in `cold` lie on the host."""
    s, size, library = step.sequences, shape.size, load_best()
    spec = PageSpec(1, s.kv_heads, PAGE_SIZE, s.head_dim, str(s.dtype).removeprefix("torch."), codec_name)
    codec = None if spec.format is None else NativeCodec(library, spec.format)
    numbers = {slot: number for number, slot in enumerate(cold)}
    places = {slot: encode_location(Tier.HOST, number) for slot, number in numbers.items()}
    steps = [
        replace(one, pages=torch.tensor([places.get(slot, slot) for slot in one.pages.tolist()]).numpy())
        for one in step.steps
    ]
    groups = join_once(size)

    def attend(rank: int) -> Tensor:
        torch.set_num_threads(1)
        pool = whole[:, rank::size].contiguous()
        host = HostPool(spec, len(cold) + 1, pinned=False)
        for slot in cold:
            page = host.page(numbers[slot])
            if codec is None:
                page.copy_(pool[:, slot][None])
            else:
                codec.encode(pool[None], slot, page)
            pool[:, slot] = 6e4
        ring = StagingRing(spec, NUM_BUFFERS * BUFFER_PAGES, host, None, None, CpuDevice())
        context = ContextGroup(groups[rank], shape.query_heads, shape.kv_heads_of)
        attention = plan_context_attention(library, steps, spec, context, ring.buffer_pages, codec)
        first, last = shape.query_heads[rank]
        own = step.q[:, first:last].contiguous()
        with streaming(ring, attention.loads) as stream:
            return attention.attend(own, own, own, pool, stream)

    with ThreadPoolExecutor(size) as threads:
        return torch.cat(list(threads.map(attend, range(size))), dim=1)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_ranks_that_share_out_pages_change_no_bit(shape: Shape, lengths: list[tuple[int, int]], codec: str) -> None:
    sequences = Sequences(
        lengths,
        [0, 2, 2, 1],
        PAGE_SIZE * shape.size,
        shape.kv_heads,
        shape.group,
        32,
        torch.bfloat16,
        seed=len(lengths),
    )
    slots = torch.randperm(sequences.num_pages + 3).tolist()[: sequences.num_pages]
    step = place(sequences, slots, garbage=100.0)
    one = by_pages_of_ranks(step, shape.size)
    library, pool, native = load_best(), one.pool, None
    if codec != "auto":
        native = NativeCodec(library, FORMATS[codec])
        round_full(native, pool, one.steps)
    whole = pool.clone()
    expected = plan_native_attention(library, one.steps, PAGE_SIZE, BUFFER_PAGES, native).attend(
        one.q, one.q, one.q, pool, None
    )
    # any page that is full before the step
    full = {slot for each in step.steps for slot in each.pages[: each.start // sequences.page_size].tolist()}
    for cold in set(), full, {slot for slot in full if slot % 3}:
        assert torch.equal(attend_on_ranks(step, whole, shape, cold, codec), expected)


def test_kernels_that_cannot_are_refused() -> None:
    with pytest.raises(ConfigError, match="native kernels of a CPU and those of CUDA"):
        CpuBackend().use_context_group(ContextGroup(ProcessGroup(), [(0, 1)], [(0, 1)]))
