"""A node that Ray drains, as it does before a machine is taken back, under an engine that works."""

import time
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group, remove_placement_group
from support import ray_cluster
from support.checkpoints import save_llama
from support.ray_cluster import Cluster

from distkv import LLM, RequestOutputKind, SamplingParams
from distkv.workers.group import drain_watch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PAGE_SIZE = 16
LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


def drain(cluster: Cluster, node_id: str, seconds: float) -> None:
    """What a cloud's notice comes to."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=cluster.address)
    assert client.drain_node(node_id, reason, "a test", int((time.time() + seconds) * 1000))[0]


def test_an_engine_leaves_the_node_and_goes_on_elsewhere(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No failure may happen, the tokens are the same, and the pages of the answer so far are found."""
    monkeypatch.setattr(drain_watch, "LOOK_SECONDS", 0.1)
    model, _ = save_llama(tmp_path / "model", max_position_embeddings=2048)
    second = ray_cluster.join(cluster, tmp_path, 2)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        while len(alive := [node for node in ray.nodes() if node["Alive"]]) < 2:
            time.sleep(0.1)
        [goes] = [node["NodeID"] for node in alive if "second" in node["Resources"]]
        held = placement_group([{"CPU": ray_cluster.NUM_CPUS - 1, "node:__internal_head__": 0.001}])
        assert held.wait(60)
        sizes = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "16MiB")
        with LLM(
            model, tensor_parallel_size=2, max_rank_failures=1, page_size=PAGE_SIZE, cache_dir=tmp_path / "cache",
            disk_write_policy="idle", num_threads=1, **sizes,
        ) as llm:  # type: ignore[arg-type]  # fmt: skip
            remove_placement_group(held)
            [expected] = llm.generate([[5] * 40], LONG, use_tqdm=False, cache_salt="other")
            stream = llm.stream([5] * 40, LONG)
            tokens = list(next(stream).outputs[0].token_ids)
            drain(cluster, goes, 60)
            for output in stream:
                tokens += output.outputs[0].token_ids
            assert tokens == expected.outputs[0].token_ids
            assert "is started anew on other nodes, since Ray drains one of its own; its 1 requests" in caplog.text
            prompt = [5] * 40 + tokens
            [again] = llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
            assert again.num_cached_tokens >= len(prompt) - 2 * PAGE_SIZE
    finally:
        ray.shutdown()
        ray_cluster.stop(second)
    assert "not saved" not in caplog.text and not ray_cluster.await_no_ranks()
