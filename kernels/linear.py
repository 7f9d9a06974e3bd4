"""Linear layers over a weight that never changes again."""

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""Maps `[tokens, in]` to `[tokens, out]`."""


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """`x @ weight.T + bias` for a weight `[out, in]` and a bias `[out]`, by torch, which reads the weight as it is."""
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The same on a CPU: where oneDNN runs the dtype, from a copy in oneDNN's blocked layout, which decode reads faster
    than the plain one."""
    if not _packs(weight.dtype):
        return plain_linear(weight, bias)
    linear = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: linear(x, packed, bias, "none", [], "")


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
