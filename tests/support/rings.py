"""Rings: tests that run in a process of their own, beside the others.

Two are the kernel tests without a GPU. Triton reads TRITON_INTERPRET when it is imported and when a kernel is defined,
so one process either interprets kernels (ring `interpreter`) or compiles them (ring `aot`). `pytest -m <ring>` runs a
ring, with its slow tests; `-m slow` has those of the ring `aot` alone, since its process compiles. The others are of
ordinary tests too, which run where they are selected unless their ring runs: `ray` of those with a Ray cluster, which
wait most of the time, and `commands` of those in the folders COMMANDS, so that a second core is not idle while one
process runs one test after the other.

The default run starts all of them beside the other tests, at a low priority, and `test_rings.py` collects them at its
end; a run that selects none of `test_rings.py` starts nothing.
"""

import fnmatch
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from support.interpreted_calls import use_quick_calls
from support.interpreted_dot import use_double_products
from support.processes import set_session_priority

KERNEL_RINGS = {"interpreter": "test_triton_*.py", "aot": "test_aot*.py"}
"""The markers of these rings, and where their tests lie: such a ring imports no other module."""
COMMANDS = ("batch", "bench", "cache_folders", "commands", "server")
"""Folders with tests of whole commands, benches and servers; those of them that no other ring has are marked
`commands`."""
SHARED_RINGS = ("ray", "commands")
"""Markers of ordinary tests, which are left out of the process that starts their ring."""
RINGS = (*KERNEL_RINGS, *SHARED_RINGS)
NICENESS = {"ray": 0, "commands": 5}
"""How far rings stand back, 10 unless it stands here; the process that starts them has 0. Ray waits most of the time,
and gives up when it takes half a minute to start."""
MODULES = KERNEL_RINGS | {"gpu": "test_gpu*.py"}
"""The markers whose tests lie apart: `-m` of one of them imports nothing else, which the machine may not be able to."""
OTHER_KINDS = ("unmarked", "slow")
LIMIT = 1200  # seconds for a ring to end in, once the other tests have
LONG = 330  # seconds of a test, more than those of pytest-timeout
PATIENCE = 40  # seconds for a ring that is interrupted to end what it has started

ALONE = pytest.StashKey[str | None]()
INTERPRETS = pytest.StashKey[bool]()
RUNS = pytest.StashKey[dict[str, "RingRun"]]()
ASIDE = pytest.StashKey[dict[str, list[pytest.Item]]]()
"""The selected tests that SHARED_RINGS run instead."""


class RingRun:
    """A ring's own pytest, on its way, and the processes that it starts: a process group, so that `stop` ends all."""

    def __init__(self, ring: str, root: Path, modules: list[str]):
        """Starts it; without modules it looks for its tests everywhere."""
        self.summary = ""  # once it has ended
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # Each test is told by its name. Where pytest-timeout cannot end one, which hangs outside the interpreter, the
        # process tells where its threads are and ends; and of what several tests lack, three may wait in vain.
        told = ["-vv", "--color=no", "--maxfail=3"]
        ends = ["-o", f"faulthandler_timeout={LONG}", "-o", "faulthandler_exit_on_timeout=true"]
        pytest_ring = [sys.executable, "-m", "pytest", "-m", f"{ring} and not slow", *told, *ends, *modules]
        niceness = NICENESS.get(ring, 10)
        self._process = subprocess.Popen(
            ["nice", "-n", str(niceness), *pytest_ring], cwd=root, stdout=self._output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        set_session_priority(self._process.pid, niceness)

    def finish(self) -> tuple[int, str]:
        """Waits for the end, which it brings about after LIMIT; returns exit status and output."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LIMIT)
        status = self._end()
        self._output.seek(0)
        said = self._output.read()
        self.summary = said.strip().rpartition("\n")[2].strip("= ")
        return status, said

    def stop(self) -> None:
        """Leaves no process behind."""
        self._end()
        self._output.close()

    def _end(self) -> int:
        """Interrupts it if it runs, so that it ends what has a process group of its own, as Ray has; kills what is
        left."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def pytest_configure(config: pytest.Config) -> None:
    """Readies the process for the ring that `-m` selects, before anything imports triton."""
    expression = config.option.markexpr
    kinds = [*MODULES, *OTHER_KINDS]
    if expression:
        kinds = [kind for kind in kinds if _selects(expression, kind)]
    selected = [kind for kind in kinds if kind in KERNEL_RINGS]
    if selected and len(kinds) > 1:
        raise pytest.UsageError(
            f"-m '{expression}' selects {', '.join(kinds)} tests in one process, and Triton either interprets or "
            "compiles: run `pytest -m interpreter` and `pytest -m aot` alone, and the others with "
            "-m 'not interpreter and not aot'"
        )
    config.stash[ALONE] = kinds[0] if len(kinds) == 1 and kinds[0] in MODULES else None
    config.stash[INTERPRETS] = selected == ["interpreter"]
    os.environ.pop("TRITON_INTERPRET", None)
    if config.stash[INTERPRETS]:
        import torch

        os.environ["TRITON_INTERPRET"] = "1"
        if sys.platform == "linux":  # Triton exists for Linux only
            use_double_products()
            use_quick_calls()
        torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests that lie apart do not import the modules of the others."""
    alone = config.stash[ALONE]
    if alone and collection_path.is_file() and not fnmatch.fnmatch(collection_path.name, MODULES[alone]):
        return True
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Checks that no test lies where its marker does not look, and leaves out those that want another process; the
    rings are collected last."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("ray"):
            raise pytest.UsageError(f"{item.nodeid}: it uses a Ray cluster; mark it ray (pytestmark = pytest.mark.ray)")
        if _is_of_commands(item):
            item.add_marker("commands")
        for kind, pattern in MODULES.items():
            if (item.get_closest_marker(kind) is not None) != fnmatch.fnmatch(item.path.name, pattern):
                raise pytest.UsageError(f"{item.nodeid}: tests marked {kind}, and no others, live in {pattern}")
    if not config.stash[INTERPRETS]:
        _leave_out(config, items, lambda item: item.get_closest_marker("interpreter") is not None)
    items.sort(key=lambda item: _ring_of(item) is not None)
    yield  # others select
    here = set(map(_ring_of, items))
    config.stash[ASIDE] = {
        ring: _leave_out(config, items, partial(_belongs_to, ring)) for ring in SHARED_RINGS if ring in here
    }


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the rings that the selected tests will ask for."""
    runs = session.config.stash.setdefault(RUNS, {})
    aside = session.config.stash.get(ASIDE, None)  # unless an error has ended the selection
    if aside is None or session.config.option.collectonly or sys.platform != "linux":
        return
    for ring in filter(None, map(_ring_of, session.items)):
        modules = sorted({str(item.path) for item in aside.get(ring, [])})
        runs[ring] = RingRun(ring, session.config.rootpath, modules)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says how many tests ran in other processes."""
    for ring, run in config.stash.get(RUNS, {}).items():
        if run.summary:
            terminalreporter.write_line(f"ring {ring}: {run.summary}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leaves no process behind, whatever ended the session."""
    for run in config.stash.get(RUNS, {}).values():
        run.stop()


def _ring_of(item: pytest.Item) -> str | None:
    """The ring that a test collects, if it is one that does."""
    return item.callspec.params["ring"] if item.path.name == "test_rings.py" and hasattr(item, "callspec") else None


def _belongs_to(ring: str, item: pytest.Item) -> bool:
    return item.get_closest_marker(ring) is not None and item.get_closest_marker("slow") is None


def _is_of_commands(item: pytest.Item) -> bool:
    has_another = any(item.get_closest_marker(kind) for kind in (*MODULES, "ray"))
    return item.path.parent.name in COMMANDS and not has_another


def _leave_out(
    config: pytest.Config, items: list[pytest.Item], is_left_out: Callable[[pytest.Item], bool]
) -> list[pytest.Item]:
    """Takes some of the selected tests out of the run; returns them."""
    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not is_left_out(item)]
    return left_out


def _selects(expression: str, kind: str) -> bool:
    """Whether `-m` asks for tests of a kind, or for the slow ones among them and not for slow ones of any kind."""

    def matches(*markers: str) -> bool:
        return Expression.compile(expression).evaluate(lambda name, **_: name in markers)

    return matches(kind) or (matches(kind, "slow") and not matches("slow"))
