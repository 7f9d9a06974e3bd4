"""`pytest -m` selects a ring with its slow tests, or the slow tests without those that want another process."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton, and so the CUDA kernels, exist for Linux only")


def test_slow_interpreted_tests_run_with_their_ring_alone(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/engine/test_triton_engine.py", "-m"]
    for markers, expected in (("slow", "no tests collected"), ("interpreter and slow", "7/14 tests collected")):
        listed = subprocess.run([*command, markers], cwd=request.config.rootpath, capture_output=True, text=True)
        assert expected in listed.stdout, listed.stdout
