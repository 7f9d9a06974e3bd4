"""Products over a weight that never changes again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch.utils._python_dispatch import TorchDispatchMode

from distkv.kernels.linear import packed_linear, padded_rows


class RowCounts(TorchDispatchMode):
    """Notes for how many rows oneDNN is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "mkldnn::_linear_pointwise":
            self.seen.add(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def row_counts() -> Iterator[set[int]]:
    with RowCounts() as mode:
        yield mode.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_programs_serve_all_numbers_of_rows(row_counts: set[int], dtype: torch.dtype) -> None:
    """Each is held in memory for good, so there may not be one for each number that comes along."""
    generator = seeded(1)
    weight, bias = torch.randn(24, 16, generator=generator).to(dtype), torch.randn(24, generator=generator).to(dtype)
    linear = packed_linear(weight, bias)
    counts = [*range(70), 127, 128, 129, 500, 1023, 1024, 1025, 2047, 2048]
    for rows in counts:
        x = torch.randn(rows, 16, generator=generator).to(dtype)
        result = linear(x)
        assert result.shape == (rows, 24) and result.is_contiguous()
        if rows:
            expected = x.double() @ weight.double().T + bias.double()
            assert relative_error(result, expected) < TOLERANCE[dtype]
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # without AVX-512
        assert not row_counts, "torch runs it by kernels of its own"
        return
    assert row_counts == {padded_rows(rows) for rows in counts} and len(row_counts) <= len(counts) / 2 + 1


def test_sizes() -> None:
    """An eighth more than is needed at most, and none for few rows, where a step of decode has its time."""
    sizes = {rows: padded_rows(rows) for rows in range(1, 4097)}
    assert all(rows <= size <= rows * 9 / 8 for rows, size in sizes.items())
    assert all(sizes[size] == size for size in sizes.values())
    assert all(sizes[rows] == rows for rows in range(1, 17)) and sizes[2048] == 2048
    assert len(set(sizes.values())) == 80
