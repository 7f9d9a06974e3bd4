"""The default run includes the kernel tests that need a process of their own, see `rings.py`."""

import re
import sys

import pytest
from support.rings import LIMIT, PATIENCE, RINGS, RUNS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton, and so the CUDA kernels, exist for Linux only")


@pytest.mark.timeout(LIMIT + 2 * PATIENCE)
@pytest.mark.parametrize("ring", RINGS)
def test_ring(ring: str, request: pytest.FixtureRequest) -> None:
    status, output = request.config.stash[RUNS][ring].finish()
    assert status == 0, output
    assert re.search(r"\b[1-9]\d* passed\b", output), f"no test ran:\n{output}"
