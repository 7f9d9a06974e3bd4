"""The product for CUDA in Triton's interpreter: against float64, and the bits of a row whatever comes with it."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import torch
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.cuda.linear import fixed_order_gated_linear, fixed_order_linear, multiply, segments_of

pytestmark = pytest.mark.interpreter

SHAPES = {"one segment": (72, 96), "segments": (130, 700), "an end of K": (64, 299), "a few outputs": (6, 512)}
"""Outputs and K."""
shapes = pytest.mark.parametrize("outputs, depth", SHAPES.values(), ids=SHAPES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def operands(outputs: int, depth: int, dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    generator = seeded(outputs + depth)
    x, weight = torch.randn(count, depth, generator=generator), torch.randn(outputs, depth, generator=generator)
    return x.to(dtype), (weight / 8).to(dtype), torch.randn(outputs, generator=generator).to(dtype)


@dtypes
@shapes
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_bits_of_a_row_are_its_own(outputs: int, depth: int, dtype: torch.dtype, gated: bool) -> None:
    """In 1 to 50 or 136 rows, of several tiles, with segments side by side and one after the other; and they are
    right."""
    x, weight, bias = operands(outputs, depth, dtype, 136 if dtype == torch.float16 else 50)
    linear = (fixed_order_gated_linear if gated else fixed_order_linear)(weight, bias)
    whole = linear(x)
    expected = x.double() @ weight.double().T + bias.double()
    assert relative_error(whole, reference.swiglu(expected) if gated else expected) < TOLERANCE[dtype]
    for rows in (1, 2, 7, 16, 33):
        first = len(x) - 3 * rows if rows < 33 else 5
        part = x[first : first + rows].contiguous()
        for side_by_side in (False, True):
            found = multiply(part, weight, bias, gated=gated, side_by_side=side_by_side)
            assert torch.equal(found, whole[first : first + rows]), (rows, side_by_side)
    assert torch.equal(multiply(x, weight, bias, gated=gated, side_by_side=True), whole)


def test_without_a_bias_or_a_row() -> None:
    x, weight, _ = operands(130, 300, torch.float32, 3)
    assert relative_error(fixed_order_linear(weight)(x), x.double() @ weight.double().T) < TOLERANCE[torch.float32]
    assert fixed_order_linear(weight)(x[:0]).shape == (0, 130)
    with pytest.raises(ValueError, match="contiguous"):
        fixed_order_linear(weight)(x.T.contiguous().T)


@pytest.mark.parametrize("outputs, depth", [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (960, 576)])
def test_segments_cover_k_once_and_weights_are_read_by_many(outputs: int, depth: int) -> None:
    for size in (2, 4):
        count, tiles = segments_of(outputs, depth, size)
        total = -(-depth * size // 128)
        assert (count - 1) * tiles < total <= count * tiles
        assert count * -(-outputs // 128) >= 180 or tiles <= 8
        assert count <= 256
