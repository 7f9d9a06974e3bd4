"""Root mean square layer normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, accumulated in fp32.

    Shapes: x `[..., hidden]`, weight `[hidden]`, result `[..., hidden]` in x's dtype (fp32, fp16 or bf16).
    """
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
