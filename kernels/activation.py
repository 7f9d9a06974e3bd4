"""The gated activation of LLaMA's MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a fused projection.

    Shapes: gate_up `[tokens, 2 * intermediate]`, the gate in the first half; result `[tokens, intermediate]`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
