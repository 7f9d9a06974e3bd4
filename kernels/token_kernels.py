"""The kernels that work on tokens one by one, whoever implements them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distkv.kernels.linear import Linear


class MakeLinear(Protocol):
    """See `linear.plain_linear`. Called once for each weight, which it may bring into a layout of its own."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None) -> Linear: ...


def gated(make_linear: MakeLinear, swiglu: Linear) -> MakeLinear:
    """What makes `silu(gate) * up` of a fused projection, the gate in the first half of its outputs: `[tokens, in]` to
    `[tokens, out / 2]`. `swiglu` is as in `activation.py`."""

    def make(weight: Tensor, bias: Tensor | None = None) -> Linear:
        linear = make_linear(weight, bias)
        return lambda x: swiglu(linear(x))

    return make


class RmsNorm(Protocol):
    """See `norm.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor: ...


class RopeAndWriteKv(Protocol):
    """See `rope.rope_and_write_kv`."""

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, layer_pool: Tensor, page: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class TokenKernels:
    """One implementation of each."""

    name: str  # for people, and of the cache: pages of other kernels may differ in last bits
    rms_norm: RmsNorm
    rope_and_write_kv: RopeAndWriteKv
    make_linear: MakeLinear
    make_gated_linear: MakeLinear  # see `gated`
