"""Jobs on a real cluster whose Python has no distkv, by `distkv submit` and by Ray's own command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from support import ray_cluster
from support.processes import ROOT
from support.ray_cluster import Cluster, await_no_ranks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STRESS = ["stress", "--shape", "tiny", "--context", "512", "--tensor-parallel-size", "2", "--json", "s.json"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster, head = ray_cluster.start(tmp_path_factory.mktemp("ray"), 4)
    try:
        yield cluster
    finally:
        ray_cluster.stop(head)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", ".*_cache"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def start(cluster: Cluster, folder: Path, *arguments: str, source: Path = ROOT) -> "subprocess.Popen[str]":
    """`distkv submit` as a user of `source` has it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(source), "HOME": cluster.environment["HOME"]}
    command = [sys.executable, "-P", "-m", "distkv", "submit", "--address", cluster.dashboard, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def submit(cluster: Cluster, folder: Path, *arguments: str, source: Path = ROOT) -> tuple[int, str, str]:
    process = start(cluster, folder, *arguments, source=source)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


def test_a_stress_test_comes_back_with_its_picture(cluster: Cluster, tmp_path: Path) -> None:
    brought = ["--bring", "s.json", "--bring", "*.png", "--bring", "none.txt"]
    code, output, errors = submit(cluster, tmp_path, *brought, "--", *STRESS, "--plot", "s.png", "--verify")
    assert code == 0, output + errors
    assert json.loads((tmp_path / "s.json").read_text()) and (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    assert "did not write none.txt" in errors and "verified" in output
    assert await_no_ranks() == {}


def test_the_code_and_the_variables_are_those_that_were_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    """And a package of that name in the folder does not stand in the way of distkv."""
    (tmp_path / "distkv").mkdir()
    (tmp_path / "distkv" / "__init__.py").write_text("raise SystemExit(77)")
    name = f"mine-{os.getpid()}"
    given = ["--env", "GREETING=hello you", "--submission-id", name, "--bring", "s.json"]
    code, output, errors = submit(cluster, tmp_path, *given, "--", "generate", "--model", "/none", "--prompt", "a b")
    assert (code, "did not write s.json" in errors) == (2, True), output + errors
    assert "model folder '/none' does not exist" in output
    with urlopen(f"{cluster.dashboard}/api/jobs/{name}") as answer:
        assert json.load(answer)["runtime_env"]["env_vars"] == {"GREETING": "hello you"}
    code, _, errors = submit(cluster, tmp_path, *given, "--", "generate", "--model", "/none", "--prompt", "a")
    assert code == 2 and "already exists" in errors and len(errors.splitlines()) == 2


def test_a_job_outlives_who_follows_it_and_may_be_stopped(cluster: Cluster, tmp_path: Path) -> None:
    endless = ["--", "stress", "--shape", "small", "--context", "1000000", "--device-kv-bytes", "1GiB"]
    process = start(cluster, tmp_path, "--bring", "s.json", *endless)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the job goes on" in errors and "Traceback" not in errors
    name = errors.partition("--follow ")[2].split(";")[0]
    again = start(cluster, tmp_path, "--follow", name)
    time.sleep(5)
    cluster.ray("job", "stop", "--address", cluster.dashboard, name)
    output, errors = again.communicate(timeout=60)
    assert again.returncode == 143 and f"the job {name} was stopped" in errors, output + errors


def test_from_a_wheel(cluster: Cluster, wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    code, output, errors = submit(cluster, tmp_path / "work", "--", *STRESS, source=tmp_path / "site")
    assert code == 0, output + errors
    environment = json.dumps({"py_modules": [str(wheel)]})
    plain = cluster.ray(
        "job", "submit", "--address", cluster.dashboard, "--working-dir", str(tmp_path / "work"),
        "--runtime-env-json", environment, "--", "python", "-m", "distkv", *STRESS, timeout=400,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stdout + plain.stderr


def test_from_an_archive(cluster: Cluster, wheel: Path, tmp_path: Path) -> None:
    """A wheel's files at the top of a .zip are a working dir that needs nothing else."""
    archive = tmp_path / "x.zip"
    shutil.copy(wheel, archive)
    plain = cluster.ray(
        "job", "submit", "--address", cluster.dashboard, "--working-dir", str(archive), "--", "python", "-m", "distkv",
        *STRESS, timeout=400,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stdout + plain.stderr
