"""The default run includes the kernel tests that need a process of their own, see `rings.py`."""

import re
import subprocess
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


def test_slow_interpreted_tests_run_with_their_ring_alone(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/engine/test_triton_engine.py", "-m"]
    for markers, expected in (("slow", "no tests collected"), ("interpreter and slow", "7/14 tests collected")):
        listed = subprocess.run([*command, markers], cwd=request.config.rootpath, capture_output=True, text=True)
        assert expected in listed.stdout, listed.stdout
