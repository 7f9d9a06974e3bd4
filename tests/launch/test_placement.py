"""Where a group lies on a cluster that says it has GPUs: what can be seen of it without one."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import TINY
from support.processes import ROOT

from distkv import CapacityError, ConfigError, EngineConfig
from distkv.launch.fewer_ranks import fewer_sizes, with_fewer
from distkv.workers.group import placement
from distkv.workers.group.placement import PLACEMENT_REMARK, PLACEMENT_TIMEOUT, Fewer, place
from distkv.workers.model.model_config import ModelConfig

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


class Cluster:
    """Placement groups that find room at a time, on a cluster whose clock goes on as they are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, offered: int = 4, free: int = 1, free_at: float = 1e9):
        """There are `offered` CPUs, of which `free` are free, and all from a time on."""
        self.now, self.offered, self.free, self.free_at = 0.0, offered, free, free_at
        self.sizes: list[int] = []  # of the groups that were made
        self.num_removed = 0
        monkeypatch.setattr(placement, "placement_group", self._make)
        monkeypatch.setattr(placement, "remove_placement_group", self._remove)
        monkeypatch.setattr(placement, "ray", self)
        monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._pass))

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Resources": {"CPU": float(self.offered)}},
            {"Alive": False, "Resources": {"CPU": 9.0}},
        ]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(self.free)}

    def place(self, size: int, fewer: Fewer | None = None) -> int:
        return place("CPU", size, fewer, lambda: None).size

    def _make(self, bundles: list[dict[str, int]], strategy: str) -> SimpleNamespace:
        self.sizes.append(len(bundles))
        return SimpleNamespace(wait=partial(self._wait, len(bundles)))

    def _wait(self, size: int, seconds: float) -> bool:
        self._pass(seconds)
        return size <= self.free or (self.now >= self.free_at and size <= self.offered)

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def _remove(self, _: object) -> None:
        self.num_removed += 1


def test_a_group_that_waits_for_room_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert Cluster(monkeypatch, free_at=PLACEMENT_REMARK).place(4) == 4
    assert caplog.messages == []
    assert Cluster(monkeypatch, free_at=PLACEMENT_REMARK + 9).place(4) == 4
    assert caplog.messages == ["waiting for 4 free CPUs of the cluster, 1 are free now; this gives up after 60 s"]
    crowded = Cluster(monkeypatch)
    with pytest.raises(CapacityError, match=r"4 CPUs were not free within 60 s, 1 are now"):
        crowded.place(4)
    assert crowded.now == PLACEMENT_TIMEOUT and len(caplog.messages) == 2
    assert len(crowded.sizes) == crowded.num_removed == 1


@pytest.mark.parametrize("free, made", [(3, [4, 3]), (2, [4, 2])])
def test_fewer_ranks_are_placed_when_all_have_waited(
    monkeypatch: pytest.MonkeyPatch, free: int, made: list[int]
) -> None:
    crowded = Cluster(monkeypatch, free=free)
    assert crowded.place(4, Fewer((2, 3), after=20)) == free
    assert crowded.sizes == made and crowded.num_removed == 1 and crowded.now == 21
    crowded = Cluster(monkeypatch, free=free)
    assert crowded.place(4, Fewer((1, 2), after=20)) == 2 and crowded.sizes == [4, 2], "the heads allow no 3"
    assert Cluster(monkeypatch, free=free, free_at=15).place(4, Fewer((2, 3), after=20)) == 4


def test_a_cluster_that_has_lost_a_node_may_get_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group is made for which it has too few; for fewer than the least nobody waits."""
    shrunk = Cluster(monkeypatch, offered=3, free=3)
    assert shrunk.place(4, Fewer((1, 2, 3), after=20)) == 3 and shrunk.sizes == [3] and shrunk.now == 21
    grown = Cluster(monkeypatch, offered=3, free=3)
    monkeypatch.setattr(grown, "_pass", lambda seconds: grown.__dict__.update(now=grown.now + 1, offered=4, free=4))
    placement.time.sleep = grown._pass  # type: ignore[assignment]
    assert grown.place(4, Fewer((1, 2, 3), after=20)) == 4 and grown.sizes == [4]
    small = Cluster(monkeypatch, offered=2, free=2)
    with pytest.raises(CapacityError, match="needs 3 at least, of 4, CPUs and the cluster has 2"):
        small.place(4, Fewer((3,), after=20))
    assert small.now == 0 and not small.sizes


def test_ranks_that_are_free_on_paper_become_fewer_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has just died counts for some seconds."""
    stale = Cluster(monkeypatch, free=3)
    monkeypatch.setattr(stale, "_wait", lambda size, seconds: stale._pass(seconds) or size <= 1)  # type: ignore[func-returns-value]
    assert stale.place(4, Fewer((1, 2, 3), after=20)) == 1 and stale.sizes == [4, 3, 2, 1]


@pytest.mark.parametrize(
    "offered, size, num_stages, bundles, strategy",
    [
        ([8, 8], 4, 2, [2, 2], "SPREAD"),
        ([4], 4, 2, [2, 2], "SPREAD"),  # one node is enough
        ([3, 3, 2], 8, 2, [1] * 8, "PACK"),  # none has room for four
        ([4, 2, 2], 8, 2, [1] * 8, "PACK"),
        ([1, 1, 1], 3, 3, [1] * 3, "SPREAD"),
        ([4], 4, 1, [1] * 4, "PACK"),
    ],
)
def test_stages_have_a_node_each(
    monkeypatch: pytest.MonkeyPatch, offered: list[int], size: int, num_stages: int, bundles: list[int], strategy: str
) -> None:
    cluster = Cluster(monkeypatch, offered=sum(offered), free=sum(offered))
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in offered]
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    made: list[object] = []
    monkeypatch.setattr(
        placement,
        "placement_group",
        lambda *one, strategy: made.append((*one, strategy)) or cluster._make(*one, strategy),
    )
    placed = place("CPU", size, None, lambda: None, num_stages)
    assert made == [([{"CPU": count} for count in bundles], strategy)]
    assert [placed.bundle(rank) for rank in range(size)] == [
        bundle for bundle, count in enumerate(bundles) for _ in range(count)
    ]


def test_room_for_stages_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch)
    with pytest.raises(CapacityError, match="pipeline_parallel_size 3 times tensor_parallel_size 2 needs 6 CPUs"):
        place("CPU", 6, None, lambda: None, 3)
    held = Cluster(monkeypatch)
    with pytest.raises(CapacityError, match="4 CPUs, 2 on a node for each stage, were not free within 60 s"):
        place("CPU", 4, None, lambda: None, 2)
    assert held.num_removed == 1


def test_one_of_two_ranks_stays_on_ray(caplog: pytest.LogCaptureFixture) -> None:
    """With the options that need it; sums keep their parts where bits are promised."""
    config = EngineConfig("/", tensor_parallel_size=2, max_rank_failures=1, hang_timeout=5, min_tensor_parallel_size=1)
    alone, num_parts = with_fewer(config, 1, "cpu")
    assert alone.is_on_ray and alone.tensor_parallel_size == 1 and alone.hang_timeout == 5
    assert num_parts == 2 and "so answers are the same" in caplog.messages[0]
    assert with_fewer(config, 1, "cuda")[1] is None and "may differ" in caplog.messages[1]
    assert with_fewer(replace(config, batch_invariant=True), 1, "cuda")[1] == 2
    assert with_fewer(config, 1, "simulated")[1] == 2, "which computes as a CPU does"


def test_the_heads_say_how_many_ranks_will_do() -> None:
    def sizes(least: int, size: int, heads: int, kv_heads: int, policy: str = "full") -> tuple[int, ...]:
        options = {"tensor_parallel_size": size, "max_rank_failures": 1, "min_tensor_parallel_size": least}
        options |= {"attention_policy": policy}
        model = ModelConfig.from_dict(TINY | {"num_attention_heads": heads, "num_key_value_heads": kv_heads})
        return fewer_sizes(EngineConfig("/", **options), model)  # type: ignore[arg-type]

    assert sizes(1, 8, 32, 8) == tuple(range(1, 8))
    assert sizes(3, 8, 32, 8) == tuple(range(3, 8))
    assert sizes(1, 16, 32, 8) == (1, 2, 4, 8), "two ranks hold each head, and must stay together"
    assert sizes(1, 3, 4, 2) == (1, 2)
    with pytest.raises(ConfigError, match="can be taken by 1, 2, 4, 8; lower it to 8 or less"):
        sizes(9, 16, 32, 8)
    for policy in ("top_pages(share=0.1)", "decay"):  # by the queries of a KV head, which one rank must have
        assert sizes(1, 8, 32, 8, policy) == tuple(range(1, 8))
        with pytest.raises(ConfigError, match="16 ranks share 8 of these, and fewer would choose others; use a"):
            sizes(1, 16, 32, 8, policy)
    assert sizes(1, 16, 32, 8, "sink_window(sinks=4, window=64)") == (1, 2, 4, 8)
