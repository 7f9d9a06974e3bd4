"""`distkv bench kernels` calls each kernel as it is meant to be called: its rows at shapes so small that Triton's
interpreter runs them, with a clock that stands still. The rows themselves compare what comes out with torch's."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from support.meters import fake_turns as turns

from distkv.bench import kernel_memory, kernel_products
from distkv.bench.device import LinkCeiling, MatmulCeiling, MemoryCeiling
from distkv.bench.kernel_attention import decode_row, prefill_row
from distkv.bench.kernel_memory import elementwise_rows, page_rows
from distkv.bench.kernel_products import product_rows, products
from distkv.bench.kernel_work import AttentionShape
from distkv.errors import DistKVError
from distkv.models.shapes import SHAPES
from distkv.workers.attention import cuda as cuda_attention
from distkv.workers.attention import decode_plan

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
SHAPE = AttentionShape(query_heads=4, kv_heads=2, head_dim=16, page_size=16, dtype=torch.float32)
MEMORY = MemoryCeiling(CPU, 4096)  # 8192 bytes a copy: 8.192 MB/s on this clock


def wrong(*arguments: Any, **options: Any) -> None:
    """In the place of a kernel."""


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "DECODE_SPLIT", 32)


def test_decode_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 sequences of 70 tokens, whose last pages and splits are filled in part."""
    row = decode_row(turns(), MEMORY, SHAPE, batch=3, context=70)
    assert row["kv_bytes"] == 3 * 70 * 2 * 2 * 16 * 4
    assert row["bytes_per_s"] == row["torch_bytes_per_s"] == pytest.approx(1e3 * row["kv_bytes"])
    assert row["read_bytes_per_s"] == pytest.approx(4096e3)
    assert row["share"] == pytest.approx(row["kv_bytes"] / 4096)
    assert row["own_read_bytes_per_s"] == pytest.approx(1e3 * 3 * 80 * 2 * 2 * 16 * 4), "of 5 pages each"
    assert row["own_share"] == pytest.approx(70 / 80)
    assert 0 < row["error"] < 1e-6
    without_peer = decode_row(turns(free_bytes=0), MEMORY, SHAPE, batch=1, context=20)
    assert without_peer["torch_bytes_per_s"] is None and without_peer["error"] is None
    monkeypatch.setattr(cuda_attention, "merge_splits", wrong)
    with pytest.raises(DistKVError, match="decode of 2 x 40 tokens differs"):
        decode_row(turns(), MEMORY, SHAPE, batch=2, context=40)


def test_prefill_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = prefill_row(turns(), MatmulCeiling(CPU, torch.float32, 8), SHAPE, 50)
    assert row["flops"] == 4 * 4 * 16 * 50 * 50 // 2
    assert row["flops_per_s"] == row["torch_flops_per_s"] == pytest.approx(1e3 * row["flops"])
    assert row["matmul_flops_per_s"] == pytest.approx(1e3 * 2 * 8**3)
    assert row["share"] == pytest.approx(row["flops"] / 1024)
    assert 0 < row["error"] < 1e-6
    monkeypatch.setattr(cuda_attention, "prefill_walk", wrong)
    with pytest.raises(DistKVError, match="prefill of 50 tokens differs"):
        prefill_row(turns(), MatmulCeiling(CPU, torch.float32, 8), SHAPE, 50)


def test_elementwise_rows() -> None:
    rows = list(elementwise_rows(turns(), MEMORY, SHAPE, num_tokens=20, hidden=32, intermediate=48))
    assert {row["kernel"]: row["bytes"] for row in rows} == {
        "rms_norm": (2 * 20 + 1) * 32 * 4,
        "rms_norm, residual": (4 * 20 + 1) * 32 * 4,
        "swiglu": 3 * 20 * 48 * 4,
        "rope + KV write": 20 * (8 * 16 * 4 + 6 * 16 * 4 + 4 * 16 * 4 + 2 * 8 * 4 + 2 * 8),
    }
    for row in rows:
        assert row["bytes_per_s"] == pytest.approx(1e3 * row["bytes"])
        assert row["share"] == pytest.approx(row["bytes"] / 8192)


def test_product_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(SHAPES["llama-3-8b"]) == {
        "qkv": (6144, 4096, False),
        "attention out": (4096, 4096, False),
        "gate and up": (28672, 4096, True),
        "down": (4096, 14336, False),
        "head": (128256, 4096, False),
    }
    for gated in (False, True):
        rows = list(product_rows(turns(), "one", 48, 300, gated, torch.float32, (1, 5)))
        assert [row["rows"] for row in rows] == [1, 5] and rows[0]["share"] == 1
        assert rows[1]["flops_per_s"] == pytest.approx(1e3 * 2 * 5 * 48 * 300)
        assert rows[1]["bytes_per_s"] == pytest.approx(1e3 * 48 * 300 * 4)
    wrong = replace(kernel_products.CUDA_KERNELS, make_linear=lambda weight: lambda x: x @ weight.T * 1.1)
    monkeypatch.setattr(kernel_products, "CUDA_KERNELS", wrong)
    with pytest.raises(DistKVError, match="one of 2 rows differs from cuBLAS"):
        list(product_rows(turns(), "one", 48, 300, False, torch.float32, (2,)))


def test_page_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(LinkCeiling(CPU, 2048)) as link:
        rows = list(page_rows(turns(), link, slice_bytes=256, num_bytes=2048))
        assert [row["direction"] for row in rows] == ["host to device", "device to host"]
        for row in rows:
            assert row["bytes"] == 2048 and row["slice_bytes"] == 256
            assert row["kernel_bytes_per_s"] == row["engine_bytes_per_s"] == row["link_bytes_per_s"]
            assert row["kernel_bytes_per_s"] == pytest.approx(2048e3) and row["kernel_share"] == 1
        monkeypatch.setattr(kernel_memory, "copy_pages", wrong)
        with pytest.raises(DistKVError, match="256 bytes from host to device are not what they were"):
            list(page_rows(turns(), link, slice_bytes=256, num_bytes=2048))
