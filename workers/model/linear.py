"""Linear layers over a rank's part of a weight."""

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""Maps `[tokens, in]` to `[tokens, out]`."""


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """`x @ weight.T + bias` for a weight `[out, in]` and a bias `[out]` that never change again.

    On a CPU where oneDNN runs the dtype, the product uses a copy in oneDNN's blocked layout, which decode reads faster
    than the plain one; elsewhere it uses the weight as it is.
    """
    if _packs(weight):
        linear = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: linear(x, packed, bias, "none", [], "")
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def side_by_side(first: Linear, second: Linear) -> Linear:
    """Maps `[tokens, in]` to the outputs of both, `[tokens, out of first + out of second]`."""
    return lambda x: torch.cat([first(x), second(x)], dim=1)


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
