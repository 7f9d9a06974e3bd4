"""Tensor parallelism on a real Ray cluster: equal answers, clear deaths, nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import ray
import zarr
from prometheus_client.parser import text_string_to_metric_families
from support import ray_cluster
from support.checkpoints import edit_weights, save_llama
from support.cpu_plans import plan_on_cpu, planned_bytes
from support.damage import flip_bit
from support.processes import ROOT, kill, listening, read_line, start_python
from support.prompts import random_prompt, random_prompts
from support.ray_cluster import Cluster, await_no_ranks, rank_processes
from support.rules import rule_requests, save_speaking_llama

from distkv import LLM, AsyncLLM, CapacityError, ConfigError, DistKVError, RequestError, SamplingParams, WorkerDied
from distkv.engine.protocol import EngineRequest
from distkv.engine.stats import EngineStats
from distkv.storage.disk.catalogue import Catalogue

pytestmark = pytest.mark.ray

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
SHARING = {"decode_context_parallel_size": 2}
UNEVEN = {"tie_word_embeddings": True, "vocab_size": 130, "intermediate_size": 113}
INEXACT = {"kv_cache_dtype": "int8", "attention_policy": "top_pages(pages=3)"}


def check_nothing_is_left(cluster: Cluster) -> None:
    assert await_no_ranks() == {}
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        states = {group["state"] for group in ray.util.placement_group_table().values()}
        assert states <= {"REMOVED"}
        deadline = time.monotonic() + 30  # Ray tells the resources of dead actors a moment later
        while ray.available_resources().get("CPU") != ray_cluster.NUM_CPUS and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources()["CPU"] == ray_cluster.NUM_CPUS
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    "heads, kv_heads, size, options, more",
    [
        (6, 3, 2, {"attention_bias": True, "mlp_bias": True}, {}),  # 2 + 1 KV heads
        (6, 3, 2, {}, INEXACT),
        *(pytest.param(6, 3, 2, {}, {name: INEXACT[name]}, marks=pytest.mark.slow) for name in INEXACT),
        pytest.param(6, 3, 3, UNEVEN, {}, marks=pytest.mark.slow),  # only heads are even
        (4, 2, 3, {"attention_bias": True, **UNEVEN}, {}),  # one KV head is held twice, the other once; nothing is even
        # two ranks share out the pages of one KV head
        (4, 1, 2, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, SHARING),
    ],
)
def test_ranks_change_nothing(
    cluster: Cluster, tmp_path: Path, heads: int, kv_heads: int, size: int, options: dict, more: dict
) -> None:
    """Tokens are those of one rank, also by codes, where each rank chooses pages for its heads, and where ranks share
    pages out."""
    folder, _ = save_llama(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads, **options
    )
    prompts = random_prompts(1, 20, 70)
    # penalties count tokens that rank 0 has drawn and nobody has read yet, and all ranks run them
    penalised = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, repetition_penalty=1.3, logprobs=1)
    params = [GREEDY, SamplingParams(temperature=1, seed=4, n=2, max_tokens=20, logprobs=2), penalised]
    engine: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "device_kv_bytes": "4MiB", **more}
    with LLM(folder, **engine | dict.fromkeys(SHARING, 1)) as alone:
        expected = alone.generate(prompts, params, use_tqdm=False)
    with LLM(folder, tensor_parallel_size=size, ray_address=cluster.address, **engine) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats().pages_in_use == 0
        assert (llm.stats().policy.share_chosen is None) == ("attention_policy" not in more)
        for prompt, one, together in zip(prompts, params, outputs, strict=True):
            again = llm.generate([prompt], one, use_tqdm=False)[0]
            assert again.outputs == together.outputs, "neighbours and known pages change no bit"
    for output, single in zip(outputs, expected, strict=True):
        for answer, other in zip(output.outputs, single.outputs, strict=True):
            assert (answer.token_ids, answer.finish_reason) == (other.token_ids, other.finish_reason)
            for table, wanted in zip(answer.logprobs or [], other.logprobs or [], strict=True):
                assert table.keys() == wanted.keys()
                for token, entry in table.items():
                    assert entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-4)
    assert outputs[1].outputs[0].logprobs
    check_nothing_is_left(cluster)


def test_rules_hold_with_any_number_of_ranks(cluster: Cluster, tmp_path: Path) -> None:
    """One request of each kind: what they allow is known where rank 0 samples, and prompts are scored by all ranks."""
    folder = save_speaking_llama(tmp_path)
    prompts, params = map(list, zip(*rule_requests(), strict=True))
    engine = {"page_size": 16, "max_num_batched_tokens": 64, "device_kv_bytes": "4MiB"}
    with LLM(folder, **engine) as alone:
        expected = alone.generate(prompts, params, use_tqdm=False)
    with LLM(folder, tensor_parallel_size=2, ray_address=cluster.address, **engine) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, single in zip(outputs, expected, strict=True):
        answers = [[(one.token_ids, one.text, one.finish_reason) for one in two.outputs] for two in (output, single)]
        assert answers[0] == answers[1]
        assert (output.prompt_logprobs is None) == (single.prompt_logprobs is None)
        for table, wanted in zip(output.prompt_logprobs or [], single.prompt_logprobs or [], strict=True):
            assert (table and table.keys()) == (wanted and wanted.keys())
            for token, entry in (table or {}).items():
                assert wanted is not None and entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-4)


@pytest.mark.slow
def test_the_demo_model_in_bf16_beside_another_group(cluster: Cluster, demo_model: Path, tiny_model: Path) -> None:
    """3 KV heads on 2 ranks; the end of one group leaves the other alone."""
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    params = SamplingParams(temperature=0, n=2, max_tokens=40, stop="is Paris")
    with LLM(demo_model, tensor_parallel_size=2, ray_address=cluster.address, device_kv_bytes="64MiB") as llm:
        with LLM(tiny_model, ray_address=cluster.address, device_kv_bytes="4MiB") as other:
            assert other.generate([[5]], GREEDY, use_tqdm=False)[0].finished
        for answer in llm.chat(question, params, use_tqdm=False)[0].outputs:
            assert (answer.text, answer.stop_reason) == ("The capital of France ", "is Paris")
        while llm.stats().num_running:  # an abort is not answered
            time.sleep(0.01)
        assert llm.stats().pages_in_use == 0
    check_nothing_is_left(cluster)


def test_an_event_loop_on_a_cluster(cluster: Cluster, tiny_model: Path) -> None:
    async def tokens(llm: AsyncLLM, prompt: list[int]) -> list[int]:
        return [output async for output in llm.generate(prompt, GREEDY)][-1].outputs[0].token_ids

    async def main() -> None:
        async with await AsyncLLM.create(tiny_model, ray_address=cluster.address, device_kv_bytes="4MiB") as llm:
            assert await asyncio.gather(*(tokens(llm, [5, number]) for number in range(8))) == expected
            outputs = llm.generate([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))
            await anext(outputs)
            await outputs.aclose()
            while (await llm.stats()).num_running:  # an abort is not answered
                await asyncio.sleep(0.01)
            while llm._front_end.thread.engine.has_work:  # tokens that were on their way
                await asyncio.sleep(0.01)

    with LLM(tiny_model, device_kv_bytes="4MiB") as alone:
        prompts = [[5, number] for number in range(8)]
        expected = [one.outputs[0].token_ids for one in alone.generate(prompts, GREEDY, use_tqdm=False)]
    asyncio.run(main())
    check_nothing_is_left(cluster)


def save_with_heads(folder: Path, kv_heads: int) -> Path:
    """A random model whose heads divide unevenly among ranks; its vocabulary is small enough to compare whole."""
    return save_llama(
        folder,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        hidden_size=96,
        max_position_embeddings=1024,
        vocab_size=20,
    )[0]


@pytest.mark.parametrize(
    "size, kv_heads", [(2, 3), pytest.param(3, 3, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_tiers_change_nothing_for_several_ranks(cluster: Cluster, tmp_path: Path, size: int, kv_heads: int) -> None:
    """Bit for bit against the same ranks with everything resident; 3 KV heads on 2 ranks are 2 + 1, and 2 of them on 3
    ranks are one that two ranks hold, and another. Nor do drafts. Figures and the trace are of all ranks."""
    folder = save_with_heads(tmp_path, kv_heads)
    prompts = [random_prompt(length, length, end=20) for length in (300, 40)]
    # the log-probabilities of the whole vocabulary stand for the logits, which do not leave the cluster
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=20)
    options = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 2, "tensor_parallel_size": size}
    cache, page_bytes = tmp_path / "cache", 2 * 2 * max(size, kv_heads) * 16 * 16 * 4
    tiers: list[tuple[dict[str, Any], set[str]]] = [
        ({"host_kv_bytes": 0}, set()),
        (
            {"device_kv_bytes": 7 * page_bytes, "host_kv_bytes": 60 * page_bytes, "max_num_seqs": 9,
             "speculative_config": {"method": "self", "adaptive": False}},
            {"host_streamed"},
        ),
        (
            {"device_kv_bytes": 7 * page_bytes, "host_kv_bytes": 6 * page_bytes, "cache_dir": cache,
             "disk_kv_bytes": 60 * page_bytes, "trace": tmp_path / "steps.json"},
            {"host_to_disk", "disk_streamed"},
        ),
    ]  # fmt: skip
    answers = []
    for number, (sizes, moved) in enumerate(tiers):
        (model := tmp_path / f"model-{number}-of-{size}-ranks").symlink_to(folder)  # for metrics, by its name
        with LLM(model, ray_address=cluster.address, **(options | sizes)) as llm:
            assert llm.info.page_bytes == page_bytes
            if "device_kv_bytes" in sizes:
                kv_bytes = {name: size for name, size in sizes.items() if name.endswith("_kv_bytes")}
                assert llm.info.tier_bytes == planned_bytes(plan_on_cpu(folder, **options, **kv_bytes))
            outputs = llm.generate(prompts, params, use_tqdm=False)
            stats = llm.stats()
            assert moved <= stats.bytes_moved.keys() and stats.pages_recomputed == 0
            assert bool(stats.speculation.num_accepted_tokens) == ("speculative_config" in sizes)
            if "cache_dir" in sizes:
                chunks = [path.name.split(".")[4] for path in cache.glob("*/kv.zarr/c.*")]
                assert set(chunks) == {"0", "1", "2"} if kv_heads == 3 else {"0", "1"}, "a file per page and head"
                if kv_heads == 3:  # no head lies on two ranks
                    check_figures(stats, model.name, page_bytes)
        answers.append([(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs])
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]
    check_trace(tmp_path / "steps.json", size)
    check_nothing_is_left(cluster)


def check_figures(stats: EngineStats, model: str, page_bytes: int) -> None:
    """Of two answers of 40 tokens. Bytes and seconds are sums over ranks; Ray tells them too while the engine runs."""
    moved = stats.bytes_moved
    assert stats.requests.generation_tokens == 80 and stats.requests.finished["length"] == 2
    assert sum(stats.requests.inter_token_latency.counts) == 78
    assert stats.disk_read_bytes == moved["disk_streamed"] + moved.get("disk_to_host", 0)
    assert stats.disk_written_bytes == moved["host_to_disk"]
    assert moved["host_to_disk"] % page_bytes == 0, "whole pages, of which each rank has its heads"
    assert stats.seconds_moved.keys() == moved.keys() and all(stats.seconds_moved.values())
    assert stats.tiers["device"].capacity_bytes == 7 * page_bytes
    expected = {"ray_distkv_generation_tokens_total": 80, "ray_distkv_inter_token_latency_seconds_count": 78}
    exported = await_exported(expected, model)
    assert exported | expected == exported and exported["ray_distkv_tier_capacity_bytes"]


def check_trace(trace: Path, size: int) -> None:
    """The caller has it, of all ranks."""
    events = json.loads(trace.read_text())
    processes = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    assert set(processes.values()) == {"leader", *(f"rank {rank}" for rank in range(size))}
    spans = {(processes[one["pid"]], one["name"]) for one in events if one["ph"] == "X"}
    of_ranks = {(f"rank {rank}", name) for rank in range(size) for name in ("compute", "disk read")}
    assert {("leader", "prepare")} | of_ranks <= spans


def await_exported(expected: dict[str, int], model: str) -> dict[str, float]:
    """What the nodes export of a model, by name, once these values are among it, which come a second late; or what they
    export after a minute. Engines of others may have run before."""
    found: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while found | expected != found and time.monotonic() < deadline:
        time.sleep(0.5)
        for node in ray.nodes():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with suppress(OSError), urlopen(url, timeout=10) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    own = [one for one in family.samples if one.labels.get("model_name") == model]
                    found |= {sample.name: sample.value for sample in own}
    return found


@pytest.mark.parametrize(
    "kv_heads, codec",
    [
        (3, {}),
        (3, {"kv_cache_dtype": "int8"}),
        *(pytest.param(2, codec, marks=pytest.mark.slow) for codec in ({}, {"disk_kv_codec": "lossless"})),
        pytest.param(2, {"kv_cache_dtype": "int4"}, marks=pytest.mark.slow),
    ],
)
def test_pages_are_found_by_any_number_of_ranks(cluster: Cluster, tmp_path: Path, kv_heads: int, codec: dict) -> None:
    """What 1, 2 and 3 ranks write each of the others reads, all of it, and lets it lie as it is; with 2 KV heads on 3
    ranks one of them is held twice. With the pages of others a group answers what it does with its own, and so it does
    with those that it imports while it runs."""
    folder = save_with_heads(tmp_path, kv_heads)
    cache, book = tmp_path / "cache", tmp_path / "book.zarr.zip"
    # the log-probabilities of the whole vocabulary stand for the logits, which do not leave the cluster
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=20)
    options: dict[str, Any] = {
        "page_size": 16, "max_num_batched_tokens": 64, "device_kv_bytes": "1MiB", "host_kv_bytes": "1MiB",
        "cache_dir": cache, "disk_kv_bytes": "4MiB", **codec,
    }  # fmt: skip
    known: dict[int, list[int]] = {}  # by the number of ranks that computed it, a prompt with its answer
    written: dict[bytes, bytes] = {}  # pages by key
    for size in (1, 2, 3, 1):
        group = {"tensor_parallel_size": size, "ray_address": cluster.address} if size > 1 else {}
        with LLM(folder, **options, **group) as llm:
            for writers, tokens in known.items():
                prompt = [*tokens, 5, 6, 7]
                [hit] = llm.generate([prompt], params, use_tqdm=False)
                assert hit.num_cached_tokens_by_tier == {"device": 0, "host": 0, "disk": 112}, (writers, size)
                [own] = llm.generate([prompt], params, cache_salt=f"{writers}, {size}", use_tqdm=False)
                assert own.num_cached_tokens == 0
                assert hit.outputs[0].token_ids == own.outputs[0].token_ids
                for mine, other in zip(hit.outputs[0].logprobs or [], own.outputs[0].logprobs or [], strict=True):
                    assert all(mine[token].logprob == pytest.approx(other[token].logprob, abs=1e-4) for token in mine)
                if writers == 1 and size > 1:  # the same pages, from a file
                    assert llm.import_cache(book, cache_salt=f"file for {size}").num_new == 7
                    [same] = llm.generate([prompt], params, cache_salt=f"file for {size}", use_tqdm=False)
                    assert same.num_cached_tokens_by_tier == {"device": 0, "host": 0, "disk": 112}
                    assert same.outputs == hit.outputs
            prompt = random_prompt(97, 10 * size + len(known), end=20)
            [output] = llm.generate([prompt], params, use_tqdm=False)
            assert output.num_cached_tokens == 0
            known.setdefault(size, prompt + output.outputs[0].token_ids)
            if size == 1 and not book.exists():
                assert llm.export_cache(book, known[1]).num_pages == 7
            assert llm.info.cache_dir is not None
            model = Path(llm.info.cache_dir)
            assert llm.stats().pages_recomputed == 0
        now = pages_on_disk(model)
        assert {key: now[key] for key in written} == written, "what was there is there, bit for bit"
        assert len(now) > len(written)
        written = now
    check_nothing_is_left(cluster)


def pages_on_disk(model: Path) -> dict[bytes, bytes]:
    """The bytes of all pages that the catalogue lists, by key."""
    array = zarr.open_array(str(model / "kv.zarr"), mode="r")
    with closing(Catalogue(model, read_only=True)) as catalogue:
        return {entry.key: np.asarray(array[entry.slot]).tobytes() for entry in catalogue.entries()}


def test_a_killed_owner_takes_its_ranks_along(cluster: Cluster, tiny_model: Path) -> None:
    """And one that is forked from it and ends does not."""
    code = (
        "import os, signal, sys; from distkv import LLM, SamplingParams\n"
        "sizes = {'tensor_parallel_size': 2, 'device_kv_bytes': '4MiB'}\n"
        f"llm = LLM({str(tiny_model)!r}, ray_address={cluster.address!r}, **sizes)\n"
        "if (child := os.fork()) == 0: signal.alarm(60); sys.exit()\n"
        "assert os.waitpid(child, 0)[1] & 127 != signal.SIGALRM\n"
        "for _ in llm.stream([5], SamplingParams(max_tokens=None, ignore_eos=True)): print('token', flush=True)\n"
        "sys.stdin.read()"
    )
    owner = start_python(code)
    assert read_line(owner) == "token"
    assert rank_processes()
    kill(owner)
    check_nothing_is_left(cluster)


def test_one_rank_on_the_cluster_of_this_machine(cluster: Cluster, tiny_model: Path) -> None:
    with LLM(tiny_model, device_kv_bytes="4MiB") as alone:
        expected = alone.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs
    with LLM(tiny_model, ray_address="auto", device_kv_bytes="4MiB") as llm:
        assert ray.get_runtime_context().gcs_address.rpartition(":")[2] == cluster.address.rpartition(":")[2]
        assert rank_processes().keys() == {"lead"}
        assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs == expected
        with pytest.raises(CapacityError, match="KV pages"):
            llm.generate([[5] * 200], SamplingParams(n=64, max_tokens=50), use_tqdm=False)
        for token in (10**6, -1):  # as no front end would send it
            deliveries: SimpleQueue[list[Any]] = SimpleQueue()
            llm._front_end.thread.add([EngineRequest("forged", [5, token], GREEDY, 8, 0)], deliveries.put)
            [broken] = deliveries.get(timeout=60)
            assert type(broken.error) is RequestError and f"the prompt has {token}" in str(broken.error)
        stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        stream.close()
        while llm.stats().num_running:  # an abort is not answered
            time.sleep(0.01)
        assert llm.stats().pages_in_use == 0
        check_interrupted_waits(llm)
    check_nothing_is_left(cluster)


def check_interrupted_waits(llm: LLM) -> None:
    """They leave the engine in step."""
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    expected = llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0].outputs
    for _ in range(3):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                llm.generate([[7, 8]], endless, use_tqdm=False)
        timer.join()
        assert llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0].outputs == expected
        assert llm.stats().num_running == 0


@pytest.mark.parametrize("role, rank", [("follow", 1), ("lead", 0)])
def test_a_killed_rank_is_named_and_nothing_hangs(cluster: Cluster, tiny_model: Path, role: str, rank: int) -> None:
    with LLM(tiny_model, tensor_parallel_size=2, ray_address=cluster.address, device_kv_bytes="4MiB") as llm:
        llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)  # all ranks are in their loops then
        [pid] = rank_processes()[role]
        elsewhere = [one for one in listening(pid) if one != "0100007F"]
        assert len(elsewhere) <= 1, "nobody of another machine can reach it, but where Ray listens itself"
        [node] = ray.nodes()
        stream = llm.stream([5] * 10, SamplingParams(max_tokens=None, ignore_eos=True))
        next(stream)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied) as caught:
            for _ in stream:
                pass
        assert (caught.value.rank, caught.value.node) == (rank, node["NodeManagerAddress"])
        assert "process has died" in caught.value.cause
        with pytest.raises(DistKVError, match="make a new LLM"):
            llm.generate([[5]], use_tqdm=False)
    check_nothing_is_left(cluster)


def test_requests_outlive_their_engine(cluster: Cluster, tiny_model: Path) -> None:
    """Two engines of two ranks each, one of which is killed under load: all answers are as without that."""
    sampled = SamplingParams(temperature=1, seed=3, max_tokens=300, ignore_eos=True, logprobs=1, n=2)
    prompts = random_prompts(*range(20, 60, 5))
    options: dict[str, Any] = {"tensor_parallel_size": 2, "ray_address": cluster.address, "device_kv_bytes": "4MiB"}
    with LLM(tiny_model, **options, data_parallel_size=2, max_rank_failures=1) as llm:
        while len(rank_processes().get("lead", [])) < 2:
            time.sleep(0.1)
        expected = llm.generate(prompts, sampled, use_tqdm=False)
        killed, other = rank_processes()["lead"]
        streams = [llm.stream(prompt, sampled) for prompt in prompts]
        for stream in streams:
            next(stream)
        os.kill(killed, signal.SIGKILL)
        for stream, whole in zip(streams, expected, strict=True):
            assert list(stream)[-1].outputs == whole.outputs
        assert [one.outputs for one in llm.generate(prompts, sampled, use_tqdm=False)] == [
            one.outputs for one in expected
        ]
        while len(leads := rank_processes().get("lead", [])) < 2:
            time.sleep(0.1)
        assert other in leads and killed not in leads
    check_nothing_is_left(cluster)


@pytest.mark.parametrize("loop", ["follow", pytest.param("lead", marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_is_replaced(
    cluster: Cluster, tiny_model: Path, caplog: pytest.LogCaptureFixture, loop: str
) -> None:
    """Its process is there and does nothing any more."""
    options: dict[str, Any] = {"tensor_parallel_size": 2, "ray_address": cluster.address, "device_kv_bytes": "4MiB"}
    prompts = random_prompts(20, 30)
    long = SamplingParams(temperature=1, seed=3, max_tokens=400, ignore_eos=True)
    with LLM(tiny_model, **options, max_rank_failures=3, hang_timeout=2) as llm:
        expected = llm.generate(prompts, long, use_tqdm=False)
        caplog.clear()
        [stopped] = rank_processes()[loop]
        for _ in range(20):
            streams = [llm.stream(prompt, long) for prompt in prompts]
            for stream in streams:
                next(stream)
            os.kill(stopped, signal.SIGSTOP)
            for stream, whole in zip(streams, expected, strict=True):
                assert list(stream)[-1].outputs == whole.outputs
            if "is stopped" in caplog.text:
                break
            os.kill(stopped, signal.SIGCONT)  # all was over before it was stopped
        assert f"its process {stopped} is stopped" in caplog.text
        assert rank_processes()[loop] != [stopped]
    check_nothing_is_left(cluster)


def test_what_ranks_log_and_a_death_while_idle_reach_the_owner(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "tensor_parallel_size": 2, "ray_address": cluster.address, "page_size": 16, "device_kv_bytes": "1MiB",
        "host_kv_bytes": "1MiB", "cache_dir": tmp_path, "disk_kv_bytes": "1MiB", "max_num_batched_tokens": 64,
    }  # fmt: skip
    prompt = random_prompt(100, 1)
    with LLM(tiny_model, **options) as llm:
        [before] = llm.generate([prompt], GREEDY, use_tqdm=False)
    flip_bit(next(tmp_path.glob("*/kv.zarr/c.*.1.0.0")))  # the second head is the follower's
    caplog.clear()
    llm = LLM(tiny_model, **options)
    [after] = llm.generate([prompt], GREEDY, use_tqdm=False)
    assert after.outputs == before.outputs
    [pid] = rank_processes()["follow"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="rank 1"):
        llm.close()
    assert "damaged" in caplog.text, "what the leader has logged of the page that could not be read"
    check_nothing_is_left(cluster)


def test_a_damaged_shard_on_a_rank_is_a_config_error(cluster: Cluster, tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="truncated"):
        LLM(folder, tensor_parallel_size=2, ray_address=cluster.address)
    check_nothing_is_left(cluster)


@pytest.mark.slow
def test_logits_of_the_other_rank_that_are_not_finite(cluster: Cluster, tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    edit_weights(folder, lambda weights: weights["lm_head.weight"][100].fill_(np.nan))
    with LLM(folder, tensor_parallel_size=2, ray_address=cluster.address) as llm:
        [output] = llm.generate([[5]], use_tqdm=False)
    assert "not finite" in str(output.error) and str(folder) in str(output.error)


def test_a_cluster_that_is_too_small_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path, num_attention_heads=8)
    with pytest.raises(CapacityError, match=r"needs 5 CPUs and the cluster has 4"):
        LLM(folder, tensor_parallel_size=5, ray_address=cluster.address)
    check_nothing_is_left(cluster)


def test_workers_without_distkv_are_told_apart_from_dead_ones(
    cluster: Cluster, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model)
    with pytest.raises(ConfigError, match="install distkv on every node"):
        LLM(tiny_model, tensor_parallel_size=2, ray_address=cluster.address)
    check_nothing_is_left(cluster)


def test_an_address_where_nothing_answers_is_refused(cluster: Cluster, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at ray_address '127\.0\.0\.1:1'"):
        LLM(tiny_model, tensor_parallel_size=2, ray_address="127.0.0.1:1")


def test_a_cluster_that_is_gone_is_not_waited_for(
    cluster: Cluster, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's note of the last cluster outlives it. Without an address a private cluster is started instead."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets lie below it, whose paths must be short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a private cluster would have this process ask for tokens
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        with pytest.raises(ConfigError, match="ray start --head"):
            LLM(tiny_model, tensor_parallel_size=2, ray_address="auto")
        with LLM(tiny_model, tensor_parallel_size=2, device_kv_bytes="4MiB") as llm:
            assert llm.generate([[5]], GREEDY, use_tqdm=False)[0].finished
        assert not ray.is_initialized()
        assert await_no_ranks() == {}


def test_a_process_that_wants_tokens_of_a_cluster_without_them_is_told(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    """As one is that has had a cluster of its own. Ray just says that nothing refers to the actor any more."""
    script = (
        "import sys, distkv\n"
        "try: distkv.LLM(sys.argv[1], ray_address=sys.argv[2])\n"
        "except distkv.ConfigError as error: print('refused:', error)\n"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tiny_model), cluster.address]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "refused: the cluster has been started without tokens" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined(tiny_model: Path, tmp_path: Path) -> None:
    """By its note at once; by an address only where the token is meant for it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    script = (
        "import sys, distkv\n"
        "with distkv.LLM(sys.argv[1], ray_address=sys.argv[2], device_kv_bytes='4MiB') as llm:\n"
        "    print('answered', len(llm.generate([[5]], use_tqdm=False)))\n"
    )
    with_token, head = ray_cluster.start(tmp_path, 2)
    try:
        for address, mode in ("auto", {}), (with_token.address, {"RAY_AUTH_MODE": "token"}):
            command = [sys.executable, "-c", script, str(tiny_model), address]
            environment = {**os.environ, "HOME": str(tmp_path), **mode}
            ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert "answered 1" in ended.stdout, ended.stdout + ended.stderr
    finally:
        ray_cluster.stop(head)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "nonsense"])
def test_addresses_of_other_forms_are_refused(tiny_model: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        LLM(tiny_model, ray_address=address)


@pytest.mark.slow
def test_a_job_needs_nothing_of_ours_installed(cluster: Cluster, demo_model: Path) -> None:
    command = [
        "python", "-m", "distkv", "generate", "--model", str(demo_model), "--prompt", "The capital of France is",
        "--temperature", "0", "--max-tokens", "6", "--dtype", "float32", "--tensor-parallel-size", "2",
        "--device-kv-bytes", "64MiB",
    ]  # fmt: skip
    for _ in range(6):  # the part of Ray that starts jobs may come up later than the rest
        submitted = cluster.ray(
            "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--", *command, timeout=240
        )
        if "No available agent" not in submitted.stderr:
            break
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "Paris" in submitted.stdout
    assert "succeeded" in submitted.stdout
    check_nothing_is_left(cluster)


def test_ranks_lie_on_one_node_if_one_has_the_room_now(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What others hold of a big node counts; where no node is free for all, they are spread at once."""
    second = ray_cluster.join(cluster, tmp_path, 2)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        while len(ray.nodes()) < 2:
            time.sleep(0.1)
        for held, is_spread in ({"CPU": 3}, False), ({"CPU": 1, "second": 1}, True):
            assert ray.util.placement_group([held]).wait(60)
            caplog.clear()
            with LLM(tiny_model, tensor_parallel_size=2, device_kv_bytes="4MiB") as llm:
                assert llm.generate([[5]], GREEDY, use_tqdm=False)[0].finished
            assert ("no node has room for all 2 ranks" in caplog.text) == is_spread
    finally:
        ray.shutdown()
        ray_cluster.stop(second)
    check_nothing_is_left(cluster)
