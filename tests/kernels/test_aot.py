"""The token-wise kernels and the copy of pages, compiled for real chips at the shapes of real models.

All are bound by memory, so what counts is that nothing spills and that every tensor is read and written with 16 bytes
for each thread.
"""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from support.aot import CAPABILITIES, Case, Report, cases, meta

from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.norm import rms_norm
from distkv.kernels.cuda.page_copy import copy_pages
from distkv.kernels.cuda.rope import rope_and_write_kv

pytestmark = [pytest.mark.aot, pytest.mark.parametrize("capability", CAPABILITIES)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REDUCTION_BYTES = 128
"""Shared memory that the norm's sum over the warps of a program may take."""


def check(report: Report, scalars: int, shared_bytes: int = 0) -> None:
    """No spills, little shared memory, and but for `scalars` loads of one index each, 16 bytes at a time."""
    print(report)
    assert report.local_bytes == 0
    assert report.shared_bytes <= shared_bytes
    assert report.count("LDG", "128") == report.count("LDG") - scalars > 0
    assert report.count("STG", "128") == report.count("STG") > 0


def launch_rms_norm(dtype: torch.dtype, hidden: int, adds: bool) -> None:
    x, delta = meta(64, hidden, dtype=dtype), meta(64, hidden, dtype=dtype)
    rms_norm(x, meta(hidden, dtype=dtype), 1e-5, delta if adds else None)


NORMS = {
    **{f"{hidden}": (BF16, hidden, True) for hidden in (576, 2048, 4096, 8192, 16384)},
    "4096 alone": (BF16, 4096, False),
    "4096 in fp16": (FP16, 4096, True),
    "576 in fp32": (FP32, 576, True),
    "8192 in fp32": (FP32, 8192, True),
}


@pytest.mark.parametrize("case", cases(launch_rms_norm, NORMS, ["576", "4096", "8192 in fp32"]))
def test_rms_norm(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    check(report, scalars=0, shared_bytes=REDUCTION_BYTES)


def launch_swiglu(dtype: torch.dtype, width: int) -> None:
    swiglu(meta(64, 2 * width, dtype=dtype))


SWIGLUS = {
    **{f"{width}": (BF16, width) for width in (1536, 14336, 28672)},
    "14336 in fp16": (FP16, 14336),
    "1536 in fp32": (FP32, 1536),
}


@pytest.mark.parametrize("case", cases(launch_swiglu, SWIGLUS, ["14336", "1536 in fp32"]))
def test_swiglu(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    check(report, scalars=0)


def launch_rope(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    index = meta(64, dtype=torch.int64)
    angle = meta(64, 1, head_dim // 2, dtype=FP32)
    # as many pages as an H100 has memory for: strides beyond 32 bits
    pool = meta(4, 2, 2**20, kv_heads, 64, head_dim, dtype=dtype)[1]
    rope_and_write_kv(meta(64, heads + 2 * kv_heads, head_dim, dtype=dtype), angle, angle, pool, index, index)


ROPES = {
    "SmolLM2-135M": (BF16, 9, 3, 64),
    "Llama-3-8B": (BF16, 32, 8, 128),
    "Llama-3-8B in fp16": (FP16, 32, 8, 128),
    "Llama-3-70B on 8 ranks": (BF16, 8, 1, 128),
    "head_dim 80": (BF16, 32, 32, 80),
    "head_dim 96": (BF16, 32, 32, 96),
    "SmolLM2-135M in fp32": (FP32, 9, 3, 64),
}
ALWAYS_ROPES = ["SmolLM2-135M", "Llama-3-8B", "head_dim 80"]


@pytest.mark.parametrize("case", cases(launch_rope, ROPES, ALWAYS_ROPES))
def test_rope_and_write_kv(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    check(report, scalars=2)  # page and offset


def launch_copy(block: int) -> None:
    """64 layers; `block` elements are K or V of a layer's page."""
    host = meta(1000, 128, block, dtype=BF16)
    device = meta(128, 500, block, dtype=BF16).transpose(0, 1)
    copy_pages(host, device, meta(7, 2, dtype=torch.int64), 16)


@pytest.mark.parametrize("case", [Case(launch_copy, (block,)) for block in (8 * 64 * 128, 8 * 9)], ids=str)
def test_copy_pages(case: Case, capability: int, reports: list[Report]) -> None:
    [report] = reports
    check(report, scalars=2)  # from where, to where
