"""Where a group lies on a cluster that says it has GPUs: what can be seen of it without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

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
