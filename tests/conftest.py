"""What every test module shares: no network for Hugging Face, reproducible hypothesis runs, the demo model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits leaves its core to the rings

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from distkv.models.fetch import fetch_model

if TYPE_CHECKING:
    from support.aot import Case, Compiler, Report
    from support.commands import Run
    from support.ray_cluster import Cluster

pytest_plugins = ["support.rings"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite starts some hundred Python processes, each of which would compile distkv anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The same examples on every run, so that a red suite means a changed tree. `pytest --hypothesis-profile explore`
# searches further and at random.
settings.register_profile(
    "suite", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("suite"), max_examples=400, derandomize=False)
settings.load_profile("suite")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("it needs a CUDA device, and torch sees none", pytrace=False)


def pytest_collection_finish() -> None:
    """What all modules have made stays until the end: the garbage collector looks at it no more."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else bindings would say at the end of the process that their objects have leaked


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M, fetched on first use."""
    return fetch_model("smollm2", progress=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random LLaMA in fp32: `save_llama` with its defaults."""
    from support.checkpoints import save_llama

    return save_llama(tmp_path_factory.mktemp("tiny"))[0]


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """A Ray cluster on this machine, for all tests that want one; see `cluster`."""
    from support import ray_cluster

    cluster, head = ray_cluster.start(tmp_path_factory.mktemp("ray"), ray_cluster.NUM_CPUS)
    try:
        yield cluster
    finally:
        ray_cluster.stop(head)


@pytest.fixture(scope="module")
def cluster(shared_cluster: "Cluster", demo_model: Path) -> Iterator["Cluster"]:
    """The Ray cluster that tests share, and a process that may connect to it until the module ends.

    The demo model lies below the HOME that the process had before.
    """
    import ray
    from support.processes import ROOT

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", shared_cluster.environment["HOME"])  # the token to connect with lies there
        patch.chdir(ROOT)  # Ray puts the driver's folder on the workers' path
        try:
            yield shared_cluster
        finally:
            ray.shutdown()


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> "Run":
    """Runs `distkv` with these arguments and this `stdin`, and returns exit code and output: in this process, without
    the seconds that a new one takes to import what it needs."""
    from support.commands import make_run

    return make_run(monkeypatch, capfd)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of CPU threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Compiler"]:
    """Compiles ahead what the selected tests will ask for: those with the parameters `case` and `capability`."""
    from support.aot import Compiler

    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [(each["case"], each["capability"]) for each in parameters if {"case", "capability"} <= each.keys()]
    with Compiler(tmp_path_factory.mktemp("triton"), wanted) as compiler:
        yield compiler


@pytest.fixture
def reports(compiler: "Compiler", case: "Case", capability: int) -> list["Report"]:
    """The reports of the kernels that the test's case launches, in order."""
    return compiler.reports(case, capability)
