"""A group of ranks before its engine runs."""

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.ray_cluster import Cluster, await_no_ranks

from distkv import LLM, WorkerDied
from distkv.workers.group.ray_group import RayGroup

pytestmark = pytest.mark.ray


def test_a_rank_that_is_stopped_while_it_starts_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing else would end the wait for it."""
    with closing(RayGroup(2, cluster.address, "cpu", hang_timeout=2)) as group:
        pid = group.nodes[1].pid
        assert group.free_disk_bytes(tmp_path) > 0
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied, match=rf"rank 1 .*its process {pid} is stopped") as died:
            group.free_disk_bytes(tmp_path)
        assert died.value.rank == 1
    assert await_no_ranks() == {}


def test_a_rank_that_is_stopped_while_it_warms_up_is_named(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the quarter of an hour that an engine has for its first answer."""
    start, pids = RayGroup.start, []

    def stop_one(group: RayGroup, *arguments: Any) -> None:
        pids.append(group.nodes[1].pid)
        os.kill(pids[0], signal.SIGSTOP)
        start(group, *arguments)

    monkeypatch.setattr(RayGroup, "start", stop_one)
    with pytest.raises(WorkerDied, match=r"its process \d+ is stopped") as died:
        LLM(tiny_model, tensor_parallel_size=2, ray_address=cluster.address, cache_dir=tmp_path, hang_timeout=2)
    assert died.value.rank == 1 and str(pids[0]) in str(died.value)
    assert await_no_ranks() == {}
