"""The attention kernels, compiled for real chips at the shapes of real models.

Decode is bound by memory and prefill by the tensor cores. What both need: no register that spills, tensor cores for
every product of 16-bit numbers, and keys and values on their way (LDGSTS, cp.async) before they are used.
"""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from support.aot import CAPABILITIES, Case, Report, cases, meta
from support.aot_attention import launch_decode, launch_prefill, meta_states, spills

from distkv.kernels.cuda.merge import STATES, carry_like, merge_splits

pytestmark = [pytest.mark.aot, pytest.mark.parametrize("capability", CAPABILITIES)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_BYTES = 160 * 1024
"""A program's share of the 163 KiB that an A100 has for one; newer chips have 227."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


DECODES = {
    "SmolLM2-135M": (BF16, 3, 3, 64, 256, 1),
    "Llama-3-8B": (BF16, 8, 4, 128, 256, 1),
    "Llama-3-8B in fp16, 8 tokens": (FP16, 8, 4, 128, 256, 8),
    "Llama-3-8B, pages of 16": (BF16, 8, 4, 128, 16, 1),
    "Llama-3-70B on 8 ranks": (BF16, 1, 8, 128, 256, 1),
    "head_dim 80": (BF16, 32, 1, 80, 256, 1),
    "head_dim 96": (BF16, 32, 1, 96, 256, 1),
    "128 rows": (BF16, 2, 16, 128, 256, 8),
    "fp32": (FP32, 8, 4, 128, 256, 1),
    "fp32, 128 rows": (FP32, 2, 16, 64, 256, 8),
    "batch invariant": (BF16, 8, 4, 128, 256, 1, True),
    "batch invariant, 8 tokens": (FP16, 8, 16, 64, 16, 8, True),
    "batch invariant, fp32": (FP32, 8, 4, 128, 256, 1, True),
}
ALWAYS_DECODES = ["SmolLM2-135M", "Llama-3-8B", "Llama-3-8B, pages of 16", "head_dim 80", "fp32"]


@pytest.mark.parametrize("case", cases(launch_decode, DECODES, ALWAYS_DECODES))
def test_decode(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    dtype, _, group, _, _, num_tokens, *rest = case.arguments
    is_invariant = rest == [True]
    # without tensor cores ptxas likes to give up a register or two for one more program on an SM
    assert spills(report) <= (4 if dtype == FP32 else 0)
    assert report.count("LDGSTS", "128") == report.count("LDGSTS") > 0  # keys and values, ahead of their use
    if dtype != FP32:
        # up to 32 rows the product is one of a warp on every chip
        assert report.count("HMMA") + report.count("HGMMA") + report.count("UTCHMMA") > 0
        # three programs on an SM of an H100, which has 227 KiB and 64 Ki registers
        if num_tokens * group <= 16 and capability == 90 and not is_invariant:
            assert 3 * (report.shared_bytes + 1024) <= 227 * 1024
            assert 3 * 128 * report.registers <= 64 * 1024
    assert report.shared_bytes <= SHARED_BYTES


def launch_merge(dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, num_tokens: int) -> None:
    states = meta_states(512, kv_heads, num_tokens * group, head_dim=head_dim)
    result = meta(8 * num_tokens, kv_heads * group, head_dim, dtype=dtype)
    sequences = meta(8, 6, dtype=torch.int64)
    merge_splits(states, sequences, result, carry_like(result), num_tokens=num_tokens, split_tokens=256)


MERGES = {
    "Llama-3-8B": (BF16, 8, 4, 128, 1),
    "SmolLM2-135M in fp16, 8 tokens": (FP16, 3, 3, 64, 8),
    "head_dim 80": (BF16, 32, 1, 80, 1),
    "fp32": (FP32, 32, 1, 96, 2),
}


@pytest.mark.parametrize("case", cases(launch_merge, MERGES, ["Llama-3-8B", "head_dim 80"]))
def test_merge(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    assert spills(report) == 0
    # of many states, before the first one is added; once for whole tiles and once with masks
    assert report.count("LDG") >= 2 * 3 * STATES
    assert report.shared_bytes == 0


PREFILLS = {
    "SmolLM2-135M": (BF16, 3, 3, 64, 256),
    "Llama-3-8B": (BF16, 8, 4, 128, 256),
    "Llama-3-8B in fp16, pages of 16": (FP16, 8, 4, 128, 16),
    "Llama-3-70B on 8 ranks, pages of 512": (BF16, 1, 8, 128, 512),
    "head_dim 80": (BF16, 32, 1, 80, 256),
    "head_dim 96": (FP16, 32, 1, 96, 256),
    "fp32": (FP32, 3, 3, 64, 256),
    "fp32, head_dim 128": (FP32, 8, 4, 128, 256),
    "splits": (BF16, 8, 4, 128, 256, 256),
    "splits of pages of 16": (FP16, 3, 3, 64, 16, 256),
    "splits, head_dim 96": (BF16, 32, 1, 96, 256, 256),
    "splits in fp32": (FP32, 3, 3, 64, 256, 256),
}
ALWAYS_PREFILLS = ["SmolLM2-135M", "Llama-3-8B", "head_dim 80", "fp32"]


@pytest.mark.parametrize("case", cases(launch_prefill, PREFILLS, ALWAYS_PREFILLS))
def test_prefill(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    dtype, _, _, head_dim, _, *splits = case.arguments
    check_prefill(report, capability, dtype, head_dim, bool(splits))


def check_prefill(report: Report, capability: int, dtype: torch.dtype, head_dim: int, splits: bool) -> None:
    """What it takes of a chip, and what it is made of."""
    assert report.shared_bytes <= SHARED_BYTES
    assert report.count("LDGSTS", "128") > 0  # keys and values, ahead of their use
    if dtype != FP32:
        assert report.count(TENSOR_CORES[capability]) > 0
        # Hopper's run on their own: a wait for many of them, not for each
        assert report.count("WARPGROUP", "DEPBAR") <= report.count("HGMMA") // 4
        # two accumulators of head_dim 128: some words of addresses, and no sum
        assert spills(report) <= (24 if splits and head_dim > 64 and capability != 90 else 0)
    elif head_dim <= 64:  # more, and the queries alone are 128 registers
        assert spills(report) <= (8 if splits else 0)


AGREEING = {
    "Llama-3-8B": (BF16, 8, 4, 128, 256),
    "SmolLM2-135M": (FP16, 3, 3, 64, 16),
    "head_dim 96": (BF16, 32, 1, 96, 256),
    "fp32": (FP32, 8, 4, 128, 256),
}


def launch_both(dtype: torch.dtype, *shape: int) -> None:
    """Decode of one token and of eight, and prefill, as they have to agree in every bit."""
    launch_decode(dtype, *shape, num_tokens=1, batch_invariant=True)
    launch_decode(dtype, *shape, num_tokens=8, batch_invariant=True)
    launch_prefill(dtype, *shape, split_tokens=256)


@pytest.mark.parametrize("case", cases(launch_both, AGREEING, ["Llama-3-8B"]))
def test_decode_and_prefill_add_in_the_same_order(case: Case, capability: int, reports: list[Report]) -> None:
    """The same products and reductions, each with its operands spread over the threads in the same way; the prompt is
    read in splits."""
    dtype, _, _, head_dim, _ = case.arguments
    check_prefill(reports[2], capability, dtype, head_dim, splits=True)
    one, eight, prompt = (report.arithmetic for report in reports)
    assert len(one) >= 2 and one == eight == prompt, (one, eight, prompt)
