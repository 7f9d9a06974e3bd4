"""A server on a real Ray cluster that is found by its name, from another process or by a client that dies."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from support import ray_cluster
from support.processes import ROOT, kill, read_line, run_python, start_python
from support.ray_cluster import Cluster
from support.servers import ServerProcess, save_talker

from distkv import AsyncClient, Client, ConfigError, DistKVError, SamplingParams, __version__
from distkv.client import attach
from distkv.client.card import NAMESPACE, Card
from distkv.client.serve_app import application_url
from distkv.server.options import ServerOptions
from distkv.server.registration import Registration

pytestmark = pytest.mark.ray

ENGINE = ("--page-size", "16", "--device-kv-bytes", "4MiB", "--num-threads", "1")
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("talker"))


def named_server(cluster: Cluster, model: Path | str, name: str, *flags: str, **more: str) -> ServerProcess:
    """A server whose engine is in its own process, so that Ray has nothing but its name."""
    env = {**os.environ, "RAY_ADDRESS": cluster.address, **more}
    return ServerProcess(model, "--name", name, *ENGINE, *flags, env=env)


@pytest.fixture(scope="module")
def server(cluster: Cluster, talker: Path) -> Iterator[ServerProcess]:
    with named_server(cluster, talker, "first") as server:
        yield server
        assert "Traceback" not in server.log, server.log


def refused(cluster: Cluster, *flags: str) -> str:
    """What `distkv serve` says that ends before it has looked for its model."""
    command = [sys.executable, "-m", "distkv", "serve", "/no/such/model", "--port", "0", *flags]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr


def await_no_name(cluster: Cluster, name: str) -> None:
    deadline = time.monotonic() + 60
    with pytest.raises(ConfigError, match=f"no server is called '{name}'"):
        while time.monotonic() < deadline:
            Client.attach(name, ray_address=cluster.address).close()


def test_a_client_that_attaches_is_any_other(cluster: Cluster, server: ServerProcess) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with Client(server.url) as usual, Client.attach("first", ray_address=cluster.address) as client:
        assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) is handler
        [output], [expected] = (one.generate("Hello", SHORT, use_tqdm=False) for one in (client, usual))
        assert output.outputs == expected.outputs
        stream = client.stream("Hello", LONG)
        next(stream)
        assert client.stats().num_running == 1
        stream.close()
    server.await_idle()


def test_an_event_loop_goes_on_while_a_client_attaches(cluster: Cluster, server: ServerProcess) -> None:
    async def main() -> None:
        num_turns = 0
        attaching = [asyncio.create_task(AsyncClient.attach("first", ray_address=cluster.address)) for _ in range(3)]
        while not all(one.done() for one in attaching):
            num_turns += 1
            await asyncio.sleep(0.005)
        assert num_turns > 3  # it turns once when an attach holds it
        for one in attaching:
            async with one.result() as client:
                stream = client.stream("Hello", LONG)
                await anext(stream)
                await stream.aclose()

    asyncio.run(main())
    assert not ray.is_initialized()
    server.await_idle()


def test_a_client_that_is_killed_frees_its_requests(cluster: Cluster, server: ServerProcess) -> None:
    """It finds the server by RAY_ADDRESS, and has let go of Ray by the time of its death."""
    code = (
        "import os, sys, distkv; os.environ['RAY_ADDRESS'] = sys.argv[1]\n"
        "client = distkv.Client.attach('first')\n"
        "params = distkv.SamplingParams(max_tokens=1500, ignore_eos=True, n=4)\n"
        "for _ in client.stream('Hello', params): print('token', flush=True)"
    )
    client = start_python(code, cluster.address)
    assert read_line(client) == "token"
    with Client(server.url) as watcher:
        assert watcher.stats().num_running == 4
    kill(client)
    server.await_idle()


def test_a_process_that_is_connected_stays_so(cluster: Cluster, server: ServerProcess) -> None:
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        Client.attach("first").close()
        assert ray.is_initialized()

        @ray.remote(num_cpus=0)
        class Holder:
            def card(self) -> bytes:
                return json.dumps({"url": "http://127.0.0.1:1", "node_id": "", "version": "0", "later": 1}).encode()

        held = Holder.options(name="far", namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"on another node .* start it with --host 0\.0\.0\.0"):
            Client.attach("far")
        ray.kill(held)
    finally:
        ray.shutdown()


def test_what_cannot_be_attached_to_is_told(cluster: Cluster, server: ServerProcess) -> None:
    with pytest.raises(ConfigError, match=r"no server is called 'second' .* there are first\. Start one with"):
        Client.attach("second", ray_address=cluster.address)
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at ray_address '127\.0\.0\.1:1'"):
        Client.attach("first", ray_address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="no Ray cluster to look at: ray_address is 'local'"):
        Client.attach("first", ray_address="local")
    with pytest.raises(ConfigError, match="ray_address is 5"):
        Client.attach("first", ray_address=5)  # type: ignore[arg-type]
    names: list[Any] = ["", ".", "a/b", "a b", "a" * 65, None, 5, "é"]
    for name in names:
        with pytest.raises(ConfigError, match=r"name is .*; use up to 64 letters"):
            Client.attach(name, ray_address=cluster.address)
        if name is not None:
            with pytest.raises(ConfigError, match=r"name is .*; use up to 64 letters"):
                ServerOptions(name=name)
    assert not ray.is_initialized()


def test_a_name_is_refused_before_the_model_is_looked_for(cluster: Cluster, server: ServerProcess) -> None:
    assert "the name 'first' is taken" in refused(cluster, "--name", "first")
    with Client(server.url) as client:
        assert client.generate("Hello", SHORT, use_tqdm=False)[0].finished, "the first goes on"


def test_a_name_goes_with_its_server(cluster: Cluster, server: ServerProcess, talker: Path) -> None:
    """Two can be found meanwhile; the address is one that others reach, and the key comes with it."""
    with named_server(cluster, talker, "second", "--host", "0.0.0.0", DISTKV_API_KEY="secret") as second:
        with Client.attach("second", ray_address=cluster.address) as client:
            assert client.generate("Hello", SHORT, use_tqdm=False)[0].finished
            assert "0.0.0.0" not in str(client._http.base_url)
        wrong = Client.attach("second", ray_address=cluster.address, api_key="wrong")
        with wrong, pytest.raises(ConfigError, match="key"):
            wrong.stats()
        Client.attach("first", ray_address=cluster.address).close()
        second.process.kill()
        await_no_name(cluster, "second")
    Registration("second", cluster.address, "127.0.0.1", 1, None).close()
    await_no_name(cluster, "second")


def test_clients_need_no_ray() -> None:
    """Unless they attach."""
    run_python(
        "import sys; sys.modules['ray'] = None\n"
        "import distkv; distkv.Client('http://127.0.0.1:9').close(); distkv.AsyncClient('http://127.0.0.1:9')"
    )


HERE, THERE = "node 1", "node 2"


def details(**changes: Any) -> dict[str, Any]:
    """What Ray Serve tells, as far as it matters."""
    proxies = {node: {"node_ip": f"10.0.0.{node[-1]}", "status": "HEALTHY"} for node in (HERE, THERE)}
    application = {"route_prefix": "/model", "status": "RUNNING"}
    return {"applications": {"app": application}, "http_options": {}, "proxies": proxies, **changes}


def test_the_url_of_a_serve_application() -> None:
    assert application_url("app", details(), HERE) == "http://127.0.0.1:8000/model"
    anywhere = {"host": "0.0.0.0", "port": 9000}
    assert application_url("app", details(http_options=anywhere), THERE) == "http://10.0.0.2:9000/model"
    assert application_url("app", details(http_options=anywhere), "none") == "http://10.0.0.1:9000/model"
    secure = {"host": "10.1.1.1", "ssl_certfile": "cert.pem"}
    whole = {"app": {"route_prefix": "/", "status": "RUNNING"}}
    assert application_url("app", details(http_options=secure, applications=whole), HERE) == "https://10.1.1.1:8000"
    with pytest.raises(ConfigError, match="has no proxy on this node"):
        application_url("app", details(), "none")
    with pytest.raises(ConfigError, match="no proxy for HTTP that is well"):
        application_url("app", details(proxies={HERE: {"node_ip": "10.0.0.1", "status": "STARTING"}}), HERE)
    with pytest.raises(ConfigError, match=r"no route \(DEPLOYING\)"):
        application_url("app", details(applications={"app": {"route_prefix": None, "status": "DEPLOYING"}}), HERE)


APPLICATION = """
import sys, ray
from fastapi import FastAPI
from ray import serve
from starlette.responses import Response
ray.init(address=sys.argv[1], log_to_driver=False)
routes = FastAPI()
@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(routes)
class Model:
    @routes.get("/stats")
    def stats(self): return Response(sys.argv[3], media_type="application/json")
serve.start(http_options={"port": int(sys.argv[2])})
serve.run(Model.bind(), name="app", route_prefix="/app")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.mark.slow
def test_an_application_of_ray_serve_is_attached_to(cluster: Cluster, server: ServerProcess) -> None:
    stats = server.get("/stats").text
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    application = start_python(APPLICATION.replace("sys.argv[3]", repr(stats)), cluster.address, port)
    try:
        assert read_line(application) == "ready"
        with Client.attach("app", ray_address=cluster.address) as client:
            assert client.stats().num_running == 0
        Client.attach("first", ray_address=cluster.address).close()
        with pytest.raises(ConfigError, match="there are app, first"):
            Client.attach("nobody", ray_address=cluster.address)
        application.communicate("", timeout=60)
    finally:
        kill(application)


def test_a_server_that_ends_gives_its_name_up_at_once(cluster: Cluster, server: ServerProcess) -> None:
    """While it still answers what has come. The last test of this server."""
    with Client.attach("first", ray_address=cluster.address) as client:
        stream = client.stream("Hello", LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        await_no_name(cluster, "first")
        assert list(stream)[-1].finished
        assert server.process.wait(60) == 0
        *plan, drain = server.log.splitlines()
        assert all(line.startswith("plan: ") for line in plan), server.log
        assert drain.startswith("new requests are refused; open answers: 1, which have all the time")


@pytest.mark.slow
def test_a_server_that_is_a_job_is_attached_to_from_outside(cluster: Cluster, talker: Path) -> None:
    """Nothing of distkv is installed on the cluster."""
    serve = ["python", "-m", "distkv", "serve", str(talker), "--port", "0", *ENGINE]
    submit = ["job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--no-wait"]
    command = [*submit, "--submission-id", "far", "--", *serve, "--name", "far", "--host", "0.0.0.0"]
    for _ in range(6):  # the part of Ray that starts jobs may come up later than the rest
        submitted = cluster.ray(*command, timeout=120)
        if "No available agent" not in submitted.stderr:
            break
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    with await_attached(cluster, "far") as client:
        await_loaded(client)
        assert client.generate("Hello", SHORT, use_tqdm=False)[0].finished
    stopped = cluster.ray("job", "stop", "--address", cluster.dashboard, "far", timeout=120)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    await_no_name(cluster, "far")


def test_a_server_on_another_node_that_only_that_one_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both nodes of a cluster on one machine have one address, so that they cannot be told apart here."""
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(attach.ray, "get_runtime_context", lambda: here)
    for url, node, is_reached in (
        ("http://127.0.0.1:8", "there", False), ("http://[::1]:8", "there", False),
        ("http://127.0.0.1:8", "here", True), ("http://192.0.2.7:8", "there", True),
    ):  # fmt: skip
        card = Card(url, node, __version__, "key")
        if is_reached:
            assert attach._check("far", card) == (url, "key")
        else:
            with pytest.raises(ConfigError, match=r"runs on another node .* --host 0\.0\.0\.0"):
                attach._check("far", card)


def await_attached(cluster: Cluster, name: str) -> Client:
    deadline = time.monotonic() + 120
    while True:
        try:
            return Client.attach(name, ray_address=cluster.address)
        except ConfigError as error:
            if "no server is called" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def await_loaded(client: Client) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            client.stats()
            return
        except DistKVError as error:
            if "is being loaded" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.slow
def test_a_server_outlives_the_cluster(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose head Ray waits for, before it ends what has been connected to it."""
    cluster, head = ray_cluster.start(tmp_path, 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    with named_server(cluster, talker, "alone") as server:
        ray_cluster.stop(head)
        deadline = time.monotonic() + 240
        while "the name 'alone' is lost" not in server.log:
            assert time.monotonic() < deadline, server.log
            time.sleep(1)
        with Client(server.url) as client:
            assert client.generate("Hello", SHORT, use_tqdm=False)[0].finished
        assert server.terminate() == 0
