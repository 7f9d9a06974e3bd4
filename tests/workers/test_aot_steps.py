"""Decode of few new tokens, compiled ahead of the steps that need it, is compiled into what these launch."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import numpy as np
import torch
from support.aot import Case, Compiler, meta
from support.plans import sequence_step
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.runners.compile_ahead import launch_decode
from distkv.workers.runners.host_copies import send

pytestmark = pytest.mark.aot

SHAPE = CudaShape(8, 2, 64, 256, 8, torch.bfloat16, 40)
BUFFER = meta(8, 2, 2, 256, 64, dtype=torch.bfloat16)


class Loads:
    """A stream of one buffer."""

    bad_reads: dict[int, str] = {}  # noqa: RUF012

    def take(self) -> Tensor:
        return BUFFER

    def close(self) -> None: ...


POOL = meta(4, 2, 1000, 2, 256, 64, dtype=torch.bfloat16)[1]


def ahead(count: int) -> None:
    launch_decode(SHAPE, POOL, count)


def step(count: int) -> None:
    """Of three sequences over many pages, some of them cold, behind a prompt's rows."""
    lengths, last = (5000, 70, 300), 999
    steps = []
    for start in lengths:
        pages = np.arange(-(-(start + count) // 256))
        places = [encode_location(Tier.HOST, page) if page < len(pages) - 2 else last - page for page in pages.tolist()]
        steps.append(sequence_step([7] * count, start, places, start + count, 1))
    plan = plan_cuda_attention(steps, SHAPE)
    q = meta(len(lengths) * count, 12, 64, dtype=torch.bfloat16)[:, :8]
    attention = CudaAttention(plan, SHAPE, send(plan.arrays, CpuDevice()))
    assert attention.loads
    attention.attend(q, q, q, POOL, Loads())


def test_a_step_finds_its_kernels_compiled(compiler: Compiler) -> None:
    expected = {report.kernel: report for report in compiler.reports(Case(ahead, (2,)), 90)}
    found = compiler.reports(Case(step, (2,)), 90)
    assert len(expected) == 2 and {report.kernel for report in found} == expected.keys()
    for report in found:
        assert report == expected[report.kernel]
