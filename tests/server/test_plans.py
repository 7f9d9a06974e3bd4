"""Plans over HTTP: those of the planner, with a model loaded and without."""

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.cpu_plans import CPU
from support.processes import run_python
from support.servers import PlannerProcess, ServerProcess
from typer.testing import CliRunner

from distkv.commands.main import app
from distkv.errors import ConfigError
from distkv.planner.hardware import find_hardware, with_disk
from distkv.planner.model_shape import find_model
from distkv.planner.plan import make_plan
from distkv.planner.request import PlanRequest
from distkv.server.plans import PlanStart
from distkv.server.schemas.plan import PlanBody

KEY = "of-the-planner"
ASKED = {"model": "llama-3-8b", "gpu": "a100"}


@pytest.fixture(scope="module")
def planner(talker: Path) -> Iterator[PlannerProcess]:
    """A server without a model, which wants a key and is told what to begin with."""
    flags = "--gpus", "2", "--context", "16k", "--host-memory", "1GiB"
    with PlannerProcess(str(talker), *flags, env=os.environ | {"DISTKV_API_KEY": KEY}) as server:
        yield server


def test_a_body_has_the_fields_of_a_request() -> None:
    assert set(PlanBody.model_fields) == {one.name for one in fields(PlanRequest)} - {"hardware"} | {
        "gpu",
        "disk_bandwidth",
    }


def test_the_planner_needs_no_torch() -> None:
    """So that it is there at once."""
    loaded = run_python("import distkv.server.serve_planner, sys; print(*sys.modules)").split()
    assert "uvicorn" in loaded and not {"torch", "transformers", "ray"} & set(loaded)


def test_a_plan_is_the_planners(planner: PlannerProcess) -> None:
    more: dict[str, Any] = {"tensor_parallel_size": 2, "concurrency": 40, "kv_cache_dtype": "int4", "page_size": 64}
    body = ASKED | more | {"context": "128k", "host_kv_bytes": "1TiB", "disk_kv_bytes": 2**42, "disk_bandwidth": "3GB"}
    hardware = with_disk(find_hardware("a100"), 3e9)
    sizes: Any = {"context": 128 * 1024, "host_kv_bytes": 2**40, "disk_kv_bytes": 2**42}
    expected = make_plan(PlanRequest(find_model("llama-3-8b"), hardware, **more, **sizes)).to_json()
    assert planner.post("/plan", body, headers={"x-api-key": KEY}).json() == json.loads(json.dumps(expected))


def test_a_planner_has_what_other_servers_have(planner: PlannerProcess, talker: Path) -> None:
    assert planner.get("/health").status_code == 200
    for path in ("/", "/plan", "/plan/choices", "/page/plan.js"):
        assert planner.get(path).status_code == 401
    with httpx2.Client(base_url=planner.url, headers={"x-api-key": KEY}, follow_redirects=True, timeout=60) as client:
        page = client.get("/")
        assert page.url.path == "/plan" and "default-src 'self'" in page.headers["content-security-policy"]
        choices = client.get("/plan/choices").json()
        assert not choices["has_chat"] and not any(model["is_served"] for model in choices["models"])
        start = choices["start"]
        assert choices["defaults"]["page_size"] == PlanRequest.page_size
        expected = {"model": talker.name, "context": "16k", "host_kv_bytes": "1GiB", "tensor_parallel_size": 2}
        assert start | expected == start
        assert client.post("/plan", json=start).json()["fits"]
        for one in choices["models"]:
            assert client.post("/plan", json=start | {"model": one["name"]}).status_code == 200
        for one in choices["gpus"]:
            assert client.post("/plan", json=start | {"gpu": one["name"]}).json()["hardware"]["name"] == one["title"]
        assert set(client.get("/openapi.json").json()["paths"]) == {"/health", "/plan", "/plan/choices"}
        missing = client.get("/v1/models")
        assert missing.status_code == 404 and missing.json()["error"]["message"]


@pytest.mark.parametrize(
    "changes, param, message",
    [
        ({"model": "llama-9"}, None, "did you mean"),
        ({"model": "/etc"}, None, "'/etc' is not known by name"),
        ({"model": None}, "model", "this field is required"),
        ({"gpu": "h1000"}, None, "did you mean h100"),
        ({"contxt": 5}, "contxt", "leave it out"),
        ({"context": "many"}, None, "give whole tokens"),
        ({"context": 1.5}, "context", "valid integer"),
        ({"concurrency": 0}, None, "concurrency is 0"),
        ({"concurrency": "8"}, "concurrency", "valid integer"),
        ({"tensor_parallel_size": 33}, None, "at most 32"),
        ({"disk_kv_bytes": "1TiB"}, None, "by way of the host"),
        ({"disk_bandwidth": -1}, None, "disk_bandwidth is -1"),
        ({"gpu_memory_utilization": float("nan")}, None, "gpu_memory_utilization is nan"),
        ({"host_kv_bytes": float("inf")}, "host_kv_bytes", "valid integer"),
        ({"page_size": 10**400}, None, "page_size"),
        ({"model": "a" * 10**6}, "model", "300 characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(
    planner: PlannerProcess, changes: dict[str, Any], param: str | None, message: str
) -> None:
    headers = {"x-api-key": KEY, "content-type": "application/json"}
    refused = httpx2.post(f"{planner.url}/plan", content=json.dumps(ASKED | changes), headers=headers, timeout=60)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert message in error["message"] and error["param"] == param


def test_the_largest_numbers_have_a_plan(planner: PlannerProcess) -> None:
    """More than fits 64 bits comes of them."""
    body: dict[str, Any] = {
        "model": "llama-3.1-405b", "gpu": "memory=8000TiB,bandwidth=1,matrix=1,link=1", "dtype": "float32",
        "tensor_parallel_size": 128, "context": 2**40, "concurrency": 2**31 - 1, "page_size": 16,
        "max_num_batched_tokens": 2**31 - 1, "host_kv_bytes": 2**63 - 1, "disk_kv_bytes": 2**63 - 1,
    }  # fmt: skip
    plan = planner.post("/plan", body, headers={"x-api-key": KEY}).json()
    assert plan["kv_bytes_per_request"] == plan["kv_bytes_per_token"] * 2**40 > 2**63 and plan["running"] > 0


def test_a_server_begins_with_its_model(server: ServerProcess, talker: Path) -> None:
    choices = server.get("/plan/choices").json()
    assert choices["has_chat"] and choices["models"][0] == {"name": "talker", "is_served": True}
    start = choices["start"]
    expected = {"model": "talker", "context": "2k", "page_size": 16, "max_num_seqs": 64, "tensor_parallel_size": 1}
    assert start | expected == start and start["host_kv_bytes"] and start["disk_kv_bytes"]
    assert start["gpu"] == choices["gpus"][0]["name"] == "here" and start["device_kv_bytes"] == "8MiB"
    plan = server.post("/plan", start).json()
    assert server.post("/plan", start | {"model": "other"}).json() == plan, "another name of it"
    assert plan["hardware"]["is_cpu"] and plan["hardware"]["is_measured"] and plan["fits"]
    config = find_model(talker).config
    assert plan["model"]["hidden_size"] == config.hidden_size and plan["request"]["context"] == 2048
    shared = server.post("/plan", start | {"tensor_parallel_size": 2})
    assert shared.status_code == 400 and "several ranks share" in shared.json()["error"]["message"]
    assert server.post("/plan", {"model": str(talker), "gpu": "h100"}).status_code == 400
    assert 'href="plan"' in server.get("/").text and server.get("/plan").status_code == 200


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no model is given"),
        (["tiny", "--port", "80"], "--port has an effect with --serve alone"),
        (["--serve", "--json", "a.json"], "--json is for tables"),
        (["--serve", "--gpus", "4,8"], "--serve takes one --gpus"),
        (["--serve", "--gpu", "nothing"], "GPU 'nothing' is not known"),
        (["--serve", "--host", "192.0.2.1"], "cannot be listened on"),
        (["nothing", "--serve"], "known by name"),
    ],
)
def test_options_without_effect_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_a_page_for_the_machine_that_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PlanStart] = []
    monkeypatch.setattr("distkv.bench.measured.measured_machine", lambda: CPU)
    monkeypatch.setattr("distkv.server.serve_planner.serve_planner", lambda start, *_: seen.append(start))
    result = CliRunner().invoke(app, ["plan", "smollm2-135m", "--serve", "--measured"], catch_exceptions=False)
    assert result.exit_code == 0 and seen[0].hardware == CPU and seen[0].fields["gpu"] == "here"
    for more, message in ((["--gpu", "h100"], "one --gpu"), (["--gpus", "2"], "several ranks would share")):
        result = CliRunner().invoke(app, ["plan", "smollm2-135m", "--serve", "--measured", *more])
        assert isinstance(result.exception, ConfigError) and message in str(result.exception)
