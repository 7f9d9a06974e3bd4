"""Root mean square layer normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, accumulated in fp32.

    With `delta`, x becomes `x + delta` first, in place and rounded to its dtype, and the norm is that of the new x.

    Shapes: x and delta `[..., hidden]`, weight `[hidden]`, result `[..., hidden]`, all of one dtype (fp32, fp16 or
    bf16).
    """
    if delta is not None:
        x.add_(delta)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
