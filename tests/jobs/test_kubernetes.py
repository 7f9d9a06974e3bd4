"""The manifests in docs/kubernetes: valid by KubeRay's schemas, and with GPUs where the ranks run and nowhere else."""

import json
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from support.processes import ROOT

from distkv.commands.main import app
from distkv.server.app import make_app
from distkv.server.options import ServerOptions
from distkv.server.service import Service

MANIFESTS = ROOT / "docs" / "kubernetes"
SCHEMAS = json.loads(Path(__file__).with_name("kuberay_crds.json").read_text())
CLUSTERS = {"rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig"}


def read(kind: str) -> Any:
    return yaml.safe_load((MANIFESTS / f"{kind}.yaml").read_text())


@pytest.mark.parametrize("kind", CLUSTERS)
def test_manifests_are_valid(kind: str) -> None:
    validator = Draft202012Validator(SCHEMAS[kind])
    manifest = read(kind)
    assert not [error.message for error in validator.iter_errors(manifest)]
    for spoil in (
        lambda one: one["spec"].update(entryPoint="x"),
        lambda one: one["spec"][CLUSTERS[kind]].pop("headGroupSpec"),
        lambda one: one["spec"][CLUSTERS[kind]]["workerGroupSpecs"][0].update(replicas="two"),
    ):
        spoil(wrong := deepcopy(manifest))
        assert list(validator.iter_errors(wrong))


@pytest.mark.parametrize("kind", CLUSTERS)
def test_only_workers_have_gpus_and_all_have_limits(kind: str) -> None:
    cluster = read(kind)["spec"][CLUSTERS[kind]]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    for container in head["template"]["spec"]["containers"]:
        assert "memory" in container["resources"]["limits"] and "nvidia.com/gpu" not in container["resources"]["limits"]
    for group in cluster["workerGroupSpecs"]:
        for container in group["template"]["spec"]["containers"]:
            limits = container["resources"]["limits"]
            assert "memory" in limits and str(limits["nvidia.com/gpu"]) == group["rayStartParams"]["num-gpus"]
            mounted = {one["name"] for one in container["volumeMounts"]}
            assert mounted <= {one["name"] for one in group["template"]["spec"]["volumes"]} and {"models"} < mounted


def test_the_deployment_serves_with_probes_for_what_they_are() -> None:
    """Its command is one that distkv takes, and no probe kills a server that replaces a rank."""
    pod = read("deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"][:4] == ["python", "-m", "distkv", "serve"]
    command = typer.main.get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    given = command.make_context("serve", container["command"][4:]).params
    assert given["tensor_parallel_size"] == container["resources"]["limits"]["nvidia.com/gpu"]
    probes = {kind: container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")}
    assert probes == {"readinessProbe": "/health", "livenessProbe": "/livez"}
    assert set(probes.values()) <= make_app(Service(["m"], ServerOptions())).openapi()["paths"].keys()
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_the_job_runs_a_command_and_holds_no_gpu() -> None:
    spec = read("rayjob")["spec"]
    assert shlex.split(spec["entrypoint"])[:4] == ["python", "-m", "distkv", "batch"]
    assert spec["entrypointNumGpus"] == 0


def test_the_serve_config_is_rays() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(read("rayservice")["spec"]["serveConfigV2"]))
    [app] = config.applications
    assert app.import_path == "distkv.ray_serve:build_openai_app"
    [model] = app.args["llm_configs"]
    replicas, size = model["deployment_config"]["num_replicas"], model["engine_kwargs"]["tensor_parallel_size"]
    [group] = read("rayservice")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] * int(group["rayStartParams"]["num-gpus"]) == replicas * size
