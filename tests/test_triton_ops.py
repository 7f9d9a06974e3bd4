import pytest
import torch

from distkv.kernels.cuda.activation import swiglu

pytestmark = pytest.mark.interpreter


def test_x():
    g = torch.randn(3, 2 * 100)
    a, b = g.chunk(2, -1)
    torch.testing.assert_close(swiglu(g), torch.nn.functional.silu(a) * b)
