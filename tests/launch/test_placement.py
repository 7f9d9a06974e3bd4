"""Where a group lies on a cluster that says it has GPUs: what can be seen of it without one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT

from distkv import CapacityError
from distkv.workers.group import ray_group
from distkv.workers.group.ray_group import PLACEMENT_REMARK, PLACEMENT_TIMEOUT, RayGroup

PLACE = """
import ray
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR")
from distkv.workers.group.ray_group import RayGroup
group = RayGroup(2, ray.get_runtime_context().gcs_address, "auto")
bundles = [one["bundles"] for one in ray.util.placement_group_table().values() if one["state"] == "CREATED"]
free = ray.available_resources()
print(group.device, bundles, free.get("GPU", 0), free["CPU"], ray.get_gpu_ids())
group.close()
"""


@pytest.mark.slow
def test_each_bundle_has_a_gpu_and_the_driver_none(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PLACE]
    shown = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "cuda [{0: {'GPU': 1.0}, 1: {'GPU': 1.0}}] 0 2.0 []" in shown.stdout, shown.stdout + shown.stderr


class Crowded:
    """A placement group for which there is room at a time, if ever, and the clock by which that is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_at: float):
        self.now, self.free_at = 0.0, free_at
        monkeypatch.setattr(ray_group.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray_group.ray, "available_resources", lambda: {"CPU": 1.0})
        self.group: Any = RayGroup.__new__(RayGroup)
        self.group.size, self.group._placement, self.group._check_wanted = 4, self, lambda: None
        self.group._connected, self.group._actors = False, []

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now >= self.free_at


def test_a_group_that_waits_for_room_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Crowded(monkeypatch, PLACEMENT_REMARK).group._await_placement("CPU")
    assert caplog.messages == []
    Crowded(monkeypatch, PLACEMENT_REMARK + 9).group._await_placement("CPU")
    assert caplog.messages == ["waiting for 4 free CPUs of the cluster, 1 are free now; this gives up after 60 s"]
    crowded = Crowded(monkeypatch, 2 * PLACEMENT_TIMEOUT)
    with pytest.raises(CapacityError, match=r"4 CPUs were not free within 60 s, 1 are now"):
        crowded.group._await_placement("CPU")
    assert crowded.now == PLACEMENT_TIMEOUT and len(caplog.messages) == 2
