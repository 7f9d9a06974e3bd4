"""Linear layers over a weight that never changes again."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

Linear = Callable[[Tensor], Tensor]
"""Maps `[tokens, in]` to `[tokens, out]`."""


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """`x @ weight.T + bias` for a weight `[out, in]` and a bias `[out]`, by torch, which reads the weight as it is."""
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The same on a CPU: where oneDNN runs the dtype, from a copy in oneDNN's blocked layout, which decode reads faster
    than the plain one. Rows are padded, see `padded_rows`."""
    if not _packs(weight.dtype):
        return plain_linear(weight, bias)
    linear = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def run(x: Tensor) -> Tensor:
        rows = len(x)
        padding = padded_rows(rows) - rows
        if padding:
            x = pad(x, (0, 0, 0, padding))
        return linear(x, packed, bias, "none", [], "")[:rows]

    return run


def padded_rows(rows: int) -> int:
    """The next of eight sizes for each power of two. oneDNN makes a program for each number of rows that it meets, in a
    millisecond or more, and keeps some of its memory for good: about half a megabyte for each weight's shape."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def side_by_side(first: Linear, second: Linear) -> Linear:
    """Maps `[tokens, in]` to the outputs of both, `[tokens, out of first + out of second]`."""
    return lambda x: torch.cat([first(x), second(x)], dim=1)


def _packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
