import pytest
import torch
from aot import CAPABILITIES, Case, meta

from distkv.kernels.cuda.activation import swiglu

pytestmark = pytest.mark.aot


def launch(dtype, i):
    swiglu(meta(16, 2 * i, dtype=dtype))


CASES = [Case(launch, (dt, i)) for dt in (torch.bfloat16, torch.float32) for i in (1536, 14336)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_swiglu(case, capability, reports):
    [r] = reports
    print(r)
