"""A group of ranks before its engine runs."""

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest
from support.ray_cluster import Cluster, await_no_ranks

from distkv import WorkerDied
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
