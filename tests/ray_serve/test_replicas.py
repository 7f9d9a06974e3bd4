"""Two replicas of two ranks on a real Ray cluster: routing, deaths, what is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import httpx2
import pytest
import ray
from openai import OpenAI
from ray import serve
from support.processes import ROOT
from support.ray_cluster import Cluster, await_no_ranks, rank_processes
from support.servers import ServerProcess, save_talker

from distkv import Client

pytestmark = pytest.mark.ray

FLAGS = (
    "--served-model-name", "talker", "--replicas", "2", "--tensor-parallel-size", "2", "--page-size", "16",
    "--device-kv-bytes", "8MiB", "--host-kv-bytes", "0", "--num-threads", "1",
)  # fmt: skip
PAGE = 16
LETTERS = "abcdefghijklmnop "


class Served:
    """A server of replicas, and the cluster that they run on."""

    def __init__(self, server: ServerProcess, cluster: Cluster):
        self.server, self.cluster = server, cluster
        self.openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

    def answer(
        self, prompt: str, num_tokens: int, seed: int = 0, begun: Callable[[], None] | None = None
    ) -> tuple[str, int]:
        """The text of an answer as it streams, and how many tokens of the prompt were found. `begun` is called when
        the first of it is there."""
        stream = self.openai.completions.create(
            model="talker", prompt=prompt, max_tokens=num_tokens, temperature=0.8, seed=seed, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        text, found = "", 0
        for event in stream:
            if begun is not None:
                begun()
                begun = None
            text += "".join(choice.text for choice in event.choices)
            if event.usage is not None:
                assert event.usage.completion_tokens == num_tokens
                assert event.usage.prompt_tokens_details is not None
                found = event.usage.prompt_tokens_details.cached_tokens or 0
        return text, found


@pytest.fixture(scope="module")
def served(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Ends with SIGTERM, after which nothing is left on the cluster."""
    model = save_talker(tmp_path_factory.mktemp("talker"))
    with ServerProcess(model, *FLAGS, "--ray-address", cluster.address) as server:
        served = Served(server, cluster)
        yield served
        assert server.terminate() == 0, server.log
        assert await_no_ranks() == {}
        code = (
            "import json, sys, ray; from ray import serve\n"
            "ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
            "states = [one['state'] for one in ray.util.placement_group_table().values()]\n"
            "print(json.dumps([list(serve.status().applications), sorted(set(states))]))"
        )
        told = subprocess.run(
            [sys.executable, "-c", code, cluster.address], capture_output=True, text=True, timeout=120
        )
        assert json.loads(told.stdout.splitlines()[-1]) == [[], ["REMOVED"]], told.stderr


@pytest.mark.slow
def test_one_replica_with_room_answers_and_the_other_one_is_said_to_be_missing(
    cluster: Cluster, tmp_path: Path
) -> None:
    """First of all, since `served` leaves no room."""
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        held = ray.util.placement_group([{"CPU": 1}] * 2)
        ray.get(held.ready(), timeout=60)
        with ServerProcess(save_talker(tmp_path), *FLAGS, "--ray-address", cluster.address) as server:
            assert "need 4 CPUs, and 2 are free" in server.log
            body = {"model": "talker", "prompt": "x", "max_tokens": 4}
            assert server.post("/v1/completions", body).status_code == 200
            await_log(server, "1 of 2 engines run, 1 starting")
            ray.util.remove_placement_group(held)
            await_log(server, "has all its replicas now")
            assert server.terminate() == 0, server.log
            assert server.process.stdout is not None and server.process.stdout.read() == ""
    finally:
        ray.shutdown()


def await_log(server: ServerProcess, text: str) -> None:
    """Returns when a server has logged a text; fails when that does not come."""
    deadline = time.monotonic() + 180
    while text not in server.log:
        assert time.monotonic() < deadline and server.process.poll() is None, server.log
        time.sleep(0.5)


def prompts(count: int, seed: int, length: int) -> list[str]:
    """Texts of which each letter is a token."""
    chosen = random.Random(seed)
    return ["".join(chosen.choice(LETTERS) for _ in range(length)) for _ in range(count)]


def test_a_request_goes_where_its_beginning_is_known(served: Served) -> None:
    """By what the replicas have found, of all that they could have: each prefix is computed once."""
    prefixes = prompts(8, seed=1, length=10 * PAGE)
    mix = [prefix for prefix in prefixes for _ in range(6)]
    random.Random(2).shuffle(mix)
    ends = prompts(len(mix), seed=3, length=8)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda pair: served.answer(pair[0] + pair[1], 4)[1], zip(mix, ends, strict=True)))
    ideal = (len(mix) - len(prefixes)) * 10 * PAGE
    assert sum(results) >= 0.9 * ideal, (sum(results), ideal)
    with Client(served.server.url) as client:
        stats = client.stats()
    assert stats.requests.finished["length"] >= len(mix), "the figures are those of both replicas together"


def test_a_client_that_leaves_frees_its_request(served: Served) -> None:
    with httpx2.stream(
        "POST", f"{served.server.url}/v1/completions", timeout=60,
        json={"model": "talker", "prompt": "leave", "max_tokens": 2000, "ignore_eos": True, "stream": True},
    ) as response:  # fmt: skip
        next(response.iter_bytes())
    served.server.await_idle()


def test_a_request_that_can_never_run_is_refused(served: Served) -> None:
    told = served.server.post("/v1/completions", {"model": "talker", "prompt": "x", "n": 65, "max_tokens": 2000})
    assert told.status_code == 400, told.text


def test_the_planner_begins_with_the_replicas_model(served: Served) -> None:
    start = served.server.get("/plan/choices").json()["start"]
    assert (start["model"], start["tensor_parallel_size"], start["page_size"]) == ("talker", 2, PAGE)
    assert served.server.post("/plan", start).json()["fits"] and "page/plan.js" in served.server.get("/plan").text


def test_a_killed_rank_changes_no_answer(served: Served) -> None:
    """Answers of the other replica go on, those of the killed one go on elsewhere, and the replica is replaced."""
    texts = prompts(8, seed=4, length=40)

    streaming = Semaphore(0)

    def ask(index: int, begun: Callable[[], None] | None = None) -> str:
        return served.answer(texts[index], 700, index, begun)[0]

    with ThreadPoolExecutor(8) as pool:
        undisturbed = list(pool.map(ask, range(8)))
        asked = [pool.submit(ask, index, streaming.release) for index in range(8)]
        assert all(streaming.acquire(timeout=60) for _ in asked)
        assert not any(one.done() for one in asked), "nobody is asked for anything any more"
        killed = rank_processes()["follow"][0]
        os.kill(killed, signal.SIGKILL)
        assert [one.result() for one in asked] == undisturbed
    assert served.server.process.poll() is None
    deadline = time.monotonic() + 120
    while killed in rank_processes()["follow"] or any(
        len(rank_processes().get(role, [])) < 2 for role in ("lead", "follow")
    ):
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.2)
    served.answer("and on it goes", 4)


@pytest.mark.slow
def test_health_says_when_no_engine_runs(served: Served) -> None:
    """And requests wait for the next one."""
    undisturbed = served.answer("who is there", 300, seed=1)[0]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.answer, "who is there", 300, 1)
        for killed in rank_processes()["follow"]:
            os.kill(killed, signal.SIGKILL)
        told = await_health(served.server, 503)
        assert int(told.headers["retry-after"]) > 0 and "no engine runs at the moment" in told.text
        assert served.server.get("/livez").status_code == 200
        assert asked.result()[0] == undisturbed
        await_health(served.server, 200)


def await_health(server: ServerProcess, status: int) -> httpx2.Response:
    """The first answer of this status; fails when that does not come."""
    deadline = time.monotonic() + 120
    while (told := server.get("/health", timeout=30)).status_code != status:
        assert time.monotonic() < deadline, told.text
        time.sleep(0.1)
    return told


@pytest.mark.slow
def test_a_config_file_is_deployed_beside_it(
    served: Served, cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By Serve's own command, in an environment that finds distkv by its path alone."""
    model = save_talker(tmp_path)
    app = {
        "name": "second", "route_prefix": "/second", "import_path": "distkv.ray_serve:build_openai_app",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
        "args": {
            "llm_configs": [
                {
                    "model_loading_config": {"model_id": "second", "model_source": str(model)},
                    "engine_kwargs": {"page_size": 16, "device_kv_bytes": "4MiB", "load_format": "no"},
                }
            ]
        },
    }  # fmt: skip
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"applications": [app]}))
    python, dashboard = str(served.cluster.python), served.cluster.dashboard
    deploy = [python, "-m", "ray.serve.scripts", "deploy", str(file), "-a", dashboard]
    result = subprocess.run(deploy, env=served.cluster.environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    ray.init(address=served.cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        deadline = time.monotonic() + 120
        while serve.status().applications["second"].status != "DEPLOY_FAILED":
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert "load_format" in serve.status().applications["second"].message
        serve.delete("second")
    finally:
        ray.shutdown()
