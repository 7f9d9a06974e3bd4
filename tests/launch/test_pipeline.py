"""Stages of a pipeline as Ray actors: the tokens of one rank, whatever lies where."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.prompts import random_prompts
from support.ray_cluster import Cluster, await_no_ranks, rank_processes

from distkv import LLM, SamplingParams, WorkerDied

pytestmark = pytest.mark.ray

OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 512}


@pytest.mark.parametrize(
    "stages, size", [(2, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 2), (3, 1)))]
)
def test_stages_change_nothing(cluster: Cluster, tmp_path: Path, stages: int, size: int) -> None:
    """One of several stages has fewer layers than others. Pages lie on all tiers, and prompts are scored."""
    folder, _ = save_llama(
        tmp_path / "model", num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3, hidden_size=96,
        max_position_embeddings=512, tie_word_embeddings=True, vocab_size=130,
    )  # fmt: skip
    prompts = random_prompts(150, 20, 70)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=1)
    params = [greedy, SamplingParams(temperature=1, seed=4, n=2, max_tokens=20, logprobs=2), greedy]
    tiers = {"device_kv_bytes": 12 * 30720, "host_kv_bytes": 8 * 30720, "disk_kv_bytes": "4MiB"}
    layout: dict[str, Any] = {"tensor_parallel_size": size, "ray_address": cluster.address if size > 1 else None}
    with LLM(folder, **OPTIONS, device_kv_bytes="8MiB", host_kv_bytes=0, **layout) as alone:
        expected = alone.generate(prompts, params, use_tqdm=False)
    layout |= {"pipeline_parallel_size": stages, "ray_address": cluster.address}
    with LLM(folder, **OPTIONS, **tiers, cache_dir=tmp_path / "kv", **layout) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        stats = llm.stats()
    assert [one.outputs for one in outputs] == [one.outputs for one in expected]
    assert [one.prompt_logprobs for one in outputs] == [one.prompt_logprobs for one in expected]
    assert stats.bytes_moved["host_streamed"] and stats.bytes_moved["disk_streamed"]
    assert 0 < stats.stage_wait_seconds < stats.stage_seconds


@pytest.mark.slow
def test_a_stage_that_dies_is_blamed(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 0 waits for what that stage is to send, and its caller is told which rank is gone."""
    folder, _ = save_llama(tmp_path, max_position_embeddings=8192)
    options: dict[str, Any] = {"page_size": 16, "max_num_seqs": 2, "device_kv_bytes": "16MiB", "host_kv_bytes": 0}
    with LLM(folder, pipeline_parallel_size=2, ray_address=cluster.address, **options) as llm:
        stream = llm.stream([5] * 20, SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True))
        next(stream)
        [pid] = rank_processes()["follow"]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="rank 1"):
            list(stream)
    assert await_no_ranks() == {}


@pytest.mark.slow
def test_several_engines_of_stages(cluster: Cluster, tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    prompts, params = random_prompts(20, 30, 40), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(folder, **OPTIONS | {"max_model_len": 256}) as alone:
        expected = alone.generate(prompts, params, use_tqdm=False)
    layout: dict[str, Any] = {"data_parallel_size": 2, "pipeline_parallel_size": 2, "device_kv_bytes": "4MiB"}
    with LLM(folder, **OPTIONS | {"max_model_len": 256}, **layout, ray_address=cluster.address) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [one.outputs for one in outputs] == [one.outputs for one in expected]
