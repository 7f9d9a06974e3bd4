"""The attention of a step on ranks that share out pages, each a thread of this process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from support.attention_steps import Step
from support.thread_group import join_in_threads
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import Attention

if TYPE_CHECKING:
    from distkv.kernels.cuda.codec_pages import CudaCodec
    from distkv.kernels.native.codec_pages import NativeCodec


@dataclass(frozen=True)
class Heads:
    """Those of a group of ranks."""

    kv_heads: int
    group: int
    query_heads: list[tuple[int, int]]
    kv_heads_of: list[tuple[int, int]]

    @property
    def size(self) -> int:
        return len(self.query_heads)


@dataclass(frozen=True)
class RankMemory:
    """What a rank plans the attention of a step with."""

    context: ContextGroup
    spec: PageSpec
    ring: StagingRing


PlanOfRank = Callable[[list[SequenceStep], RankMemory], Attention]


def by_pages_of_ranks(step: Step, size: int) -> Step:
    """The same step over the pages of ranks: those of a larger one lie side by side."""
    page_size = step.sequences.page_size // size
    pool = step.pool.unflatten(3, (size, page_size)).movedim(3, 2).flatten(1, 2).contiguous()
    steps = []
    for one in step.steps:
        pages = (one.pages[:, None] * size + np.arange(size)).reshape(-1)
        steps.append(replace(one, pages=pages[: -(-(one.start + len(one.token_ids)) // page_size)]))
    return replace(step, pool=pool, steps=steps)


def slots_full_before(steps: list[SequenceStep], page_size: int) -> set[int]:
    """Those of the pages that are full before the step."""
    return {slot for one in steps for slot in one.pages[: one.start // page_size].tolist()}


join_once = cache(join_in_threads)


def attend_on_ranks(
    step: Step,
    whole: Tensor,
    heads: Heads,
    cold: set[int],
    codec_name: str,
    codec: "NativeCodec | CudaCodec | None",
    buffer_pages: int,
    plan_of_rank: PlanOfRank,
) -> Tensor:
    """The attention of a step on all ranks, side by side; `whole` has the pages of ranks side by side, and those of the
    leader in `cold` lie on the host, where what the device has of them is not to be read."""
    s, size = step.sequences, heads.size
    dtype = str(s.dtype).removeprefix("torch.")
    spec = PageSpec(1, s.kv_heads, s.page_size // size, s.head_dim, dtype, codec_name)
    numbers = {slot: number for number, slot in enumerate(cold)}
    places = {slot: encode_location(Tier.HOST, number) for slot, number in numbers.items()}
    steps = [
        replace(one, pages=np.array([places.get(slot, slot) for slot in one.pages.tolist()])) for one in step.steps
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
        ring = StagingRing(spec, NUM_BUFFERS * buffer_pages, host, None, None, CpuDevice())
        context = ContextGroup(groups[rank], heads.query_heads, heads.kv_heads_of)
        attention = plan_of_rank(steps, RankMemory(context, spec, ring))
        first, last = heads.query_heads[rank]
        own = step.q[:, first:last].contiguous()
        stream = ring.begin(attention.loads) if attention.loads else None
        assert (stream is not None) == bool(cold)
        out = attention.attend(own, own, own, pool, stream)
        if stream is not None:
            stream.close()
        return out

    with ThreadPoolExecutor(size) as threads:
        return torch.cat(list(threads.map(attend, range(size))), dim=1)
