"""The product whose rows do not depend on one another, compiled for real chips at the shapes of real models."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from support.aot import CAPABILITIES, Case, Report, cases, meta

from distkv.kernels.cuda.linear import multiply

pytestmark = [pytest.mark.aot, pytest.mark.parametrize("capability", CAPABILITIES)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_BYTES = 160 * 1024
"""A program's share of the 163 KiB that an A100 has for one; newer chips have 227."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def launch(dtype: torch.dtype, outputs: int, depth: int, gated: bool, num_tokens: int) -> None:
    weight = meta(outputs, depth, dtype=dtype)
    multiply(meta(num_tokens, depth, dtype=dtype), weight, meta(outputs, dtype=dtype), gated=gated)


QKV, GATE_UP, DOWN, HEAD = (6144, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, False)
PRODUCTS = {
    "qkv of 1": (BF16, *QKV, 1),
    "qkv of 64": (BF16, *QKV, 64),
    "qkv of 2048": (BF16, *QKV, 2048),
    "gate and up of 1": (BF16, *GATE_UP, 1),
    "gate and up of 128": (FP16, *GATE_UP, 128),
    "gate and up of 2048": (BF16, *GATE_UP, 2048),
    "down of 33 in fp16": (FP16, *DOWN, 33),
    "down of 2048": (BF16, *DOWN, 2048),
    "head of 16": (BF16, *HEAD, 16),
    "SmolLM2-135M, gate and up of 1": (BF16, 3072, 576, True, 1),
    "fp32 of 1": (FP32, 960, 576, False, 1),
    "fp32 of 2048": (FP32, 3072, 576, True, 2048),
}
ALWAYS = ["qkv of 1", "qkv of 2048", "gate and up of 2048"]


@pytest.mark.parametrize("case", cases(launch, PRODUCTS, ALWAYS))
def test_linear(case: Case, capability: int, reports: list[Report]) -> None:
    product, *_ = reports
    dtype, *_, num_tokens = case.arguments
    for report in reports:
        print(report)
        assert report.count("LDL") + report.count("STL") == 0
        assert report.shared_bytes <= SHARED_BYTES
    assert product.count("LDGSTS", "128") > 0  # weights and tokens, ahead of their use
    if dtype != FP32:
        assert product.count("LDGSTS", "128") == product.count("LDGSTS")
        assert product.count(TENSOR_CORES[capability]) > 0
        others = {"HMMA", "HGMMA", "UTCHMMA"} - {TENSOR_CORES[capability]}
        assert not sum(map(product.count, others))  # the same for one token and for thousands
        assert product.count("WARPGROUP", "DEPBAR") <= max(2, product.count("HGMMA") // 4)
    if num_tokens <= 16 and capability == 90:  # three on an SM of an H100
        assert 3 * (product.shared_bytes + 1024) <= 227 * 1024
