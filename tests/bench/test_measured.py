"""This machine as hardware to plan for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cpu_plans import CPU
from support.meters import FakeMeter
from typer.testing import CliRunner

from distkv import ConfigError
from distkv.bench.measured import measured_gpu, measured_machine
from distkv.commands.main import app
from distkv.planner.hardware import GPUS
from distkv.planner.model_shape import find_model
from distkv.planner.plan import make_plan
from distkv.planner.request import PlanRequest


def test_a_gpu_is_what_a_clock_says_of_bytes_and_operations() -> None:
    """Which says a millisecond of everything; links between GPUs are not measured."""
    for known in (None, GPUS["h100"]):
        found = measured_gpu(FakeMeter(), torch.device("cpu"), "a GPU", 2**30, known, num_bytes=2**20, size=64)
        assert (found.memory_bandwidth, found.host_link) == (2**20 * 1e3, 2**20 * 1e3)
        assert found.matrix_rate == 2 * 64**3 * 1e3 and found.is_measured and not found.is_cpu
        assert found.peer_link == (found.host_link if known is None else known.peer_link)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU of a machine without a GPU")
def test_this_cpu_is_measured_anew() -> None:
    found = measured_machine()
    assert found.is_cpu and found.is_measured and "measured" in found.source
    # no machine that runs this is a thousand times slower or faster than today's
    rates = found.memory_bandwidth, found.host_link, found.disk_bandwidth, found.matrix_rate / 100
    assert all(1e6 < rate < 1e13 for rate in rates)


def invoke(*arguments: Any) -> str:
    arguments = tuple(map(str, arguments))
    result = CliRunner().invoke(app, ["plan", "smollm2-135m", "--measured", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_plans_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(CPU, name="this CPU")
    monkeypatch.setattr("distkv.bench.measured.measured_machine", lambda: here)
    file = tmp_path / "plan.json"
    assert "this CPU (CPU, measured)" in invoke("--json", file)
    [plan] = json.loads(file.read_text())["plans"]
    request = PlanRequest(find_model("smollm2-135m"), here)
    assert plan == json.loads(json.dumps(make_plan(request).to_json()))
    both = invoke("--gpu", "l4")
    assert "this CPU" in both and "L4" in both
    assert "2 GB/s from disk" in invoke("--disk-bandwidth", "2GB", "--disk", "1GiB", "--host-memory", "1GiB")
    with pytest.raises(ConfigError, match="several ranks would share; leave --gpus out"):
        invoke("--gpus", "1,2")
