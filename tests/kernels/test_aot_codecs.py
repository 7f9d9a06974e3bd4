"""The kernels of codes, and attention over them, compiled for real chips at the shapes of real models."""

import sys
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from support.aot import CAPABILITIES, Case, Report, cases, meta
from support.aot_attention import launch_decode, launch_prefill, spills

from distkv.kernels.codec_format import FORMATS
from distkv.kernels.cuda.codec_pages import CudaCodec

pytestmark = [pytest.mark.aot, pytest.mark.parametrize("capability", CAPABILITIES)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_BYTES = 200 * 1024


def launch_pages(name: str, dtype: torch.dtype, kv_heads: int, page_size: int, head_dim: int) -> None:
    """From a pool of 64 layers to the host and back, and a page that a step fills."""
    codec, index = CudaCodec(FORMATS[name], kv_heads, page_size, head_dim), torch.int64
    row = codec.format.row_bytes(page_size, head_dim, dtype.itemsize)
    host = meta(1000, 128, kv_heads * page_size * row, dtype=torch.uint8)
    device = meta(128, 500, kv_heads * page_size * head_dim, dtype=dtype).transpose(0, 1)
    codec.decode_rows(host, device, meta(7, 2, dtype=index), 16)
    codec.encode_rows(device, host, meta(7, 2, dtype=index), 16)
    pool = meta(4, 2, 2**26 // page_size, kv_heads, page_size, head_dim, dtype=dtype)[1]
    codec.round(pool, meta(7, dtype=index), meta(7, 2, kv_heads, page_size, head_dim, dtype=dtype))


PAGES = {
    "int4, Llama-3-8B": ("int4", BF16, 8, 256, 128),
    "int8, SmolLM2-135M": ("int8", BF16, 3, 256, 64),
    "fp8, pages of 16": ("fp8_e4m3", FP16, 8, 16, 128),
    "int4, head_dim 96 in fp32": ("int4", FP32, 8, 256, 96),
}


@pytest.mark.parametrize("case", cases(launch_pages, PAGES, ["int4, Llama-3-8B"]))
def test_pages(case: Case, capability: int, reports: list[Report]) -> None:
    """Nothing spills, and a product and a sum round one after the other; a division is made of fused ones, which are
    asked for."""
    for report in reports:
        assert spills(report) == 0
        assert report.count("LDG", "128") + report.count("LDG", "64") > 0 < report.count("STG", "128")
    assert reports[0].kernel == "_decode_rows" and reports[0].count("FFMA") == 0


ATTENTION = {
    "decode, int4": (True, "int4", BF16, 3, 3, 64, 256, 1),
    "decode, int8": (True, "int8", BF16, 8, 4, 128, 256, 1),
    "decode, fp8": (True, "fp8_e4m3", BF16, 8, 4, 128, 256, 8),
    "prefill, int4": (False, "int4", BF16, 8, 4, 128, 256),
    "prefill, int4, SmolLM2-135M": (False, "int4", BF16, 3, 3, 64, 256),
    "prefill, int8": (False, "int8", FP16, 3, 3, 64, 256),
}


def launch_attention(decodes: bool, name: str, *shape: Any) -> None:
    (launch_decode if decodes else launch_prefill)(*shape, codec=FORMATS[name])


@pytest.mark.parametrize("case", cases(launch_attention, ATTENTION, ["decode, int4", "prefill, int4, SmolLM2-135M"]))
def test_attention(case: Case, capability: int, reports: list[Report]) -> None:
    """Tensor cores, codes on their way before they are used, and nothing that spills."""
    [report] = reports
    assert report.count("HMMA") + report.count("HGMMA") + report.count("UTCHMMA") > 0
    assert report.count("LDGSTS", "128") > 0
    assert report.shared_bytes <= SHARED_BYTES
    assert spills(report) <= (0 if capability == 90 else 24)
