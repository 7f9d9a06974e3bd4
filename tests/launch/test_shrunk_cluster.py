"""A node that is killed, on a cluster that has less room then."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from support import ray_cluster
from support.checkpoints import save_llama
from support.prompts import random_prompts
from support.ray_cluster import Cluster, await_no_ranks, rank_processes

from distkv import LLM, DistKVError, SamplingParams

pytestmark = pytest.mark.ray

SAMPLED = SamplingParams(temperature=1, seed=3, max_tokens=400, ignore_eos=True, logprobs=2)
DEVICE_BYTES, HOST_BYTES = 1 << 20, 2 << 20


@pytest.fixture
def connected(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
    assert await_no_ranks() == {}


@pytest.mark.slow
@pytest.mark.parametrize("left", [2, 1])
def test_streams_go_on_with_fewer_ranks(
    cluster: Cluster,
    connected: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    left: int,
) -> None:
    """Three ranks, of which the node's one or two are killed with all that runs there. No bit of an answer changes."""
    monkeypatch.setattr("distkv.launch.fewer_ranks.FEWER_SECONDS", 2.0)
    folder, _ = save_llama(tmp_path, num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    held = ray.util.placement_group([{"CPU": ray_cluster.NUM_CPUS - left}])
    ray.get(held.ready(), timeout=60)
    second = ray_cluster.join(cluster, tmp_path, 3 - left)
    while len([node for node in ray.nodes() if node["Alive"]]) < 2:
        time.sleep(0.1)
    options: dict[str, Any] = {
        "tensor_parallel_size": 3, "dtype": "bfloat16", "page_size": 16,
        "device_kv_bytes": DEVICE_BYTES, "host_kv_bytes": HOST_BYTES,
        "cache_dir": tmp_path / "cache", "disk_kv_bytes": "4MiB", "num_threads": 1,
        "max_rank_failures": 1, "rebuild_timeout": 60, "min_tensor_parallel_size": left,
    }  # fmt: skip
    prompts = random_prompts(100, 120)
    try:
        with LLM(folder, **options) as llm:
            expected = llm.generate(prompts, SAMPLED, use_tqdm=False)
            assert [len(pids) for pids in rank_processes().values()] in ([1, 2], [2, 1])
            llm.reset_prefix_cache()
            streams = [llm.stream(prompt, SAMPLED) for prompt in prompts]
            for stream in streams:
                for _ in range(20):
                    next(stream)
            ray_cluster.kill_node(second)
            await_unready(llm)
            for stream, whole in zip(streams, expected, strict=True):
                assert list(stream)[-1].outputs == whole.outputs
            told = f"no room for 3 ranks, so the engine is started anew with {left}: they take the parts of 3"
            assert told in caplog.text
            assert sum(len(pids) for pids in rank_processes().values()) == left
            llm._front_end.thread.check_ready().result()
            tiers = llm.stats().tiers
            assert DEVICE_BYTES // 2 < tiers["device"].capacity_bytes <= DEVICE_BYTES
            assert HOST_BYTES // 2 < tiers["host"].capacity_bytes <= HOST_BYTES
            [again] = llm.generate(prompts[:1], SAMPLED, use_tqdm=False)
            assert again.outputs == expected[0].outputs and again.num_cached_tokens
    finally:
        ray_cluster.stop(second)
        ray.util.remove_placement_group(held)


def await_unready(llm: LLM) -> None:
    """Returns when the engine says that it is started anew."""
    deadline = time.monotonic() + 60
    with pytest.raises(DistKVError, match="one is started anew: rank"):
        while time.monotonic() < deadline:
            llm._front_end.thread.check_ready().result()
            time.sleep(0.01)
