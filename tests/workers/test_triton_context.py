"""Ranks that share out pages, by the CUDA kernels in the interpreter: bit for bit one rank that has all of them.

The ranks are threads, and the interpreter takes one launch at a time.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import triton_on_cpu
from support.attention_steps import Sequences, Step, place
from support.checkpoints import save_llama
from support.invariance import said
from support.prompts import random_prompt, random_prompts
from support.thread_group import join_in_threads, llm_in_threads
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from distkv import ConfigError, SamplingParams
from distkv.kernels.codec_format import FORMATS
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.storage import paging
from distkv.storage.device import CpuDevice
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention import cuda as cuda_attention
from distkv.workers.attention import cuda_context, decode_plan
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.attention.cuda_context import CudaContextAttention, context_shape, plan_cuda_context
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.kinds import KINDS
from distkv.workers.runners.host_copies import send

pytestmark = pytest.mark.interpreter
PAGE_SIZE = 64  # of a rank
BUFFER_PAGES = 2


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


ONE = Heads(1, 3, [(0, 2), (2, 3)], [(0, 1), (0, 1)])
THREE = Heads(3, 2, [(0, 4), (4, 6)], [(0, 2), (2, 3)])
THREE_RANKS = Heads(1, 3, [(0, 1), (1, 2), (2, 3)], [(0, 1), (0, 1), (0, 1)])
# tokens before the step and in it: prompts that begin, go on and end anywhere in a page, and answers
MIXED = [(0, 70), (270, 1), (128, 33), (300, 7), (250, 20), (383, 1)]


@pytest.fixture(autouse=True)
def one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And splits of a page, of which few are exchanged at a time."""
    lock, launch = threading.Lock(), GridExecutor.__call__

    def alone(self: GridExecutor, *arguments: Any, **options: Any) -> None:
        with lock:
            launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", alone)
    monkeypatch.setattr(cuda_attention, "STATE_BYTES", 1)
    monkeypatch.setattr(cuda_context, "PAGE_BYTES", 1)
    for module in (decode_plan, paging):
        monkeypatch.setattr(module, "DECODE_SPLIT", PAGE_SIZE)


def cuda_shape(step: Step, codec: CudaCodec | None, batch_invariant: bool) -> CudaShape:
    s = step.sequences
    return CudaShape(
        s.kv_heads * s.group, s.kv_heads, s.head_dim, PAGE_SIZE, BUFFER_PAGES, s.dtype, 2, batch_invariant, codec
    )


def by_pages_of_ranks(step: Step, size: int) -> Step:
    """The same step over pages of PAGE_SIZE tokens: those of a larger one lie side by side."""
    pool = step.pool.unflatten(3, (size, PAGE_SIZE)).movedim(3, 2).flatten(1, 2).contiguous()
    steps = []
    for one in step.steps:
        pages = (one.pages[:, None] * size + np.arange(size)).reshape(-1)
        steps.append(replace(one, pages=pages[: -(-(one.start + len(one.token_ids)) // PAGE_SIZE)]))
    return replace(step, pool=pool, steps=steps)


join_once = cache(join_in_threads)


def attend_on_ranks(
    step: Step, whole: Tensor, heads: Heads, cold: set[int], codec: CudaCodec | None, batch_invariant: bool, name: str
) -> Tensor:
    """The attention of a step on all ranks, side by side; `whole` has the pages of ranks side by side, and those of the
    leader in `cold` lie on the host."""
    s, size = step.sequences, heads.size
    spec = PageSpec(1, s.kv_heads, PAGE_SIZE, s.head_dim, str(s.dtype).removeprefix("torch."), name)
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
        ring = StagingRing(spec, NUM_BUFFERS * BUFFER_PAGES, host, None, None, CpuDevice())
        context = ContextGroup(groups[rank], heads.query_heads, heads.kv_heads_of)
        whole_shape = replace(cuda_shape(step, codec, batch_invariant), buffer_pages=ring.buffer_pages)
        shape = context_shape(context, whole_shape, spec)
        plan = plan_cuda_context(steps, shape)
        attention = CudaContextAttention(plan, shape, send(plan.arrays, CpuDevice()))
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


@pytest.mark.parametrize(
    "heads, lengths, codec, batch_invariant",
    [
        pytest.param(ONE, MIXED, "auto", False, id="all kinds"),
        pytest.param(THREE, MIXED[2:4], "auto", True, id="batch_invariant"),
        pytest.param(ONE, MIXED[1:4], "int8", False, id="codes"),
        pytest.param(ONE, [(64 * 33 + 3, 1)], "auto", False, id="rounds"),
        pytest.param(THREE_RANKS, MIXED, "auto", False, id="three ranks", marks=pytest.mark.slow),
        pytest.param(THREE_RANKS, [(64 * 50 + 3, 1), (64 * 33, 2)], "int4", True, id="more", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_out_pages_change_no_bit(
    heads: Heads, lengths: list[tuple[int, int]], codec: str, batch_invariant: bool
) -> None:
    sequences = Sequences(
        lengths, [0, 2, 2, 1, 1, 2][: len(lengths)], PAGE_SIZE * heads.size, heads.kv_heads, heads.group, 16,
        torch.float16,
    )  # fmt: skip
    slots = torch.randperm(sequences.num_pages + 3).tolist()[: sequences.num_pages]
    step = place(sequences, slots, garbage=100.0)
    one = by_pages_of_ranks(step, heads.size)
    pool, kernels = one.pool, None
    if codec != "auto":
        kernels = CudaCodec(FORMATS[codec], heads.kv_heads, PAGE_SIZE, sequences.head_dim)
        full = {slot for each in one.steps for slot in each.pages[: each.start // PAGE_SIZE].tolist()}
        kernels.round(pool, torch.tensor(sorted(full)))
    whole = pool.clone()
    shape = cuda_shape(step, kernels, batch_invariant)
    plan = plan_cuda_attention(one.steps, shape)
    attention = CudaAttention(plan, shape, send(plan.arrays, CpuDevice()))
    expected = attention.attend(one.q, one.q, one.q, pool, None)
    # any page that is full before the step
    full = {slot for each in step.steps for slot in each.pages[: each.start // sequences.page_size].tolist()}
    for cold in set(), {slot for slot in full if slot % 3}:
        found = attend_on_ranks(step, whole, heads, cold, kernels, batch_invariant, codec)
        assert torch.equal(found, expected), cold


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"kv_cache_dtype": "int8", "batch_invariant": True}, marks=pytest.mark.slow),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_answers_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Over a device of few pages too, in chunks of prompts and behind a prefix."""
    monkeypatch.setitem(KINDS, "cpu", triton_on_cpu.KIND)
    folder, _ = save_llama(
        tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=512,
    )  # fmt: skip
    common = random_prompt(270, 3)
    prompts = [common + own for own in random_prompts(3, 20)] + [random_prompt(9, 1) * 3]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2)
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "max_num_batched_tokens": 96, "max_num_seqs": 8}
    sizes |= {"tensor_parallel_size": 2, "host_kv_bytes": "1MiB"}
    found = []
    for more in {"device_kv_bytes": "1MiB"}, {"device_kv_bytes": 32 << 10, "decode_context_parallel_size": 2}:
        llm, _ = llm_in_threads(monkeypatch, folder, **sizes, **options, **more)
        with llm:
            found.append([said(one) for one in llm.generate(prompts, params, use_tqdm=False)])
            moved = llm.stats().bytes_moved.get("host_streamed", 0)
    assert found[0] == found[1] and moved


def test_pages_smaller_than_a_split_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "DECODE_SPLIT", 256)
    context = ContextGroup(ProcessGroup(size=2), [(0, 2), (2, 3)], [(0, 1), (0, 1)])
    spec = PageSpec(1, 1, PAGE_SIZE, 16, "float16")
    shape = CudaShape(3, 1, 16, PAGE_SIZE, BUFFER_PAGES, torch.float16, 2)
    with pytest.raises(ConfigError, match="use page_size 256 or more"):
        context_shape(context, shape, spec)


def test_parts_of_several_heads_are_refused() -> None:
    context = ContextGroup(ProcessGroup(), [(0, 3), (3, 4)], [(0, 2), (1, 2)])
    spec = PageSpec(1, 2, PAGE_SIZE, 16, "float16")
    shape = CudaShape(4, 2, 16, PAGE_SIZE, BUFFER_PAGES, torch.float16, 2)
    with pytest.raises(ConfigError, match="part of 2 KV heads"):
        context_shape(context, shape, spec)
