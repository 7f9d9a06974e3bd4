"""Ranks that share out pages, by the CUDA kernels in the interpreter: bit for bit one rank that has all of them.

The ranks are threads, and the interpreter takes one launch at a time.
"""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import triton_on_cpu
from support.attention_steps import Sequences, Step, place
from support.checkpoints import save_llama
from support.context_ranks import Heads, RankMemory, attend_on_ranks, by_pages_of_ranks, slots_full_before
from support.invariance import said
from support.prompts import random_prompt, random_prompts
from support.thread_group import llm_in_threads
from triton.runtime.interpreter import GridExecutor

from distkv import ConfigError, SamplingParams
from distkv.kernels.codec_format import FORMATS
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.storage import paging
from distkv.storage.device import CpuDevice
from distkv.storage.page_spec import PageSpec
from distkv.workers.attention import context_attention, decode_plan
from distkv.workers.attention import cuda as cuda_attention
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.attention.cuda_context import CudaContextAttention, context_shape, plan_cuda_context
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.kinds import KINDS
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send

pytestmark = pytest.mark.interpreter
PAGE_SIZE = 64  # of a rank
BUFFER_PAGES = 2


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
    monkeypatch.setattr(context_attention, "PAGE_BYTES", 1)
    for module in (decode_plan, paging):
        monkeypatch.setattr(module, "DECODE_SPLIT", PAGE_SIZE)


def cuda_shape(step: Step, codec: CudaCodec | None, batch_invariant: bool) -> CudaShape:
    s = step.sequences
    return CudaShape(
        s.kv_heads * s.group, s.kv_heads, s.head_dim, PAGE_SIZE, BUFFER_PAGES, s.dtype, 2, batch_invariant, codec
    )


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
        kernels.round(pool, torch.tensor(sorted(slots_full_before(one.steps, PAGE_SIZE))))
    whole = pool.clone()
    shape = cuda_shape(step, kernels, batch_invariant)
    plan = plan_cuda_attention(one.steps, shape)
    attention = CudaAttention(plan, shape, send(plan.arrays, CpuDevice()))
    expected = attention.attend(one.q, one.q, one.q, pool, None)

    def plan_of_rank(steps: list[SequenceStep], rank: RankMemory) -> CudaContextAttention:
        own = replace(shape, buffer_pages=rank.ring.buffer_pages)
        cut = context_shape(rank.context, own, rank.spec)
        plan = plan_cuda_context(steps, cut)
        return CudaContextAttention(plan, cut, send(plan.arrays, CpuDevice()))

    full = slots_full_before(step.steps, sequences.page_size)
    for cold in set(), {slot for slot in full if slot % 3}:
        found = attend_on_ranks(step, whole, heads, cold, codec, kernels, BUFFER_PAGES, plan_of_rank)
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
