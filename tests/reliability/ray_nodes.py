"""A Ray cluster whose nodes are processes of this machine that can be stopped and killed, each by itself."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reliability.our_processes import Family
from support.processes import ROOT, TESTS
from support.ray_cluster import free_ports

START_TIMEOUT = 180.0  # seconds


@dataclass
class RayNode:
    """All processes of a node are of one session."""

    process: subprocess.Popen[bytes]
    family: Family

    def pids(self, title: str) -> list[int]:
        """Of the processes of this node whose titles have this in them."""
        return [pid for pid, other in self.family.members().items() if title in other and self._has(pid)]

    def kill(self) -> None:
        """All of it at once, as a machine that loses its power."""
        for pid in [self.process.pid, *(pid for pid in self.family.members() if self._has(pid))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _has(self, pid: int) -> bool:
        with suppress(ProcessLookupError):
            return os.getsid(pid) == self.process.pid
        return False


class RayNodes:
    """A head node and others, each with its number of CPUs."""

    def __init__(self, folder: Path, family: Family, num_cpus: tuple[int, ...]):
        """`folder` becomes HOME and has Ray's sockets, whose paths must be short."""
        self._folder, self._family = folder, family
        hidden = ("RAY_", "PYTHONPATH", "HOME", "VIRTUAL_ENV")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self._environment |= family.environment | {
            "HOME": str(folder), "RAY_TMPDIR": str(folder), "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
            "RAY_raylet_start_wait_time_s": "120",  # on a machine that has other things to do
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        [port, *_] = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.nodes: list[RayNode] = []
        self._add(num_cpus[0], ["--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"])
        for count in num_cpus[1:]:
            self.join(count)

    def join(self, num_cpus: int) -> RayNode:
        """One more node."""
        return self._add(num_cpus, [f"--address={self.address}"])

    def rank_pids(self, loop: str = "") -> list[int]:
        """Processes of ranks: those in `lead`, `follow`, `load`, `allocate`, or all of them."""
        wanted = f"ray::RankActor.{loop}" if loop else "ray::RankActor"
        return sorted(pid for pid, title in self._family.members().items() if title.startswith(wanted))

    def any_rank(self, numbers: random.Random) -> int:
        """One of them, by chance."""
        return numbers.choice(self.rank_pids())

    def stop(self) -> None:
        """Ends the nodes, the head last, in peace where that can be."""
        for node in reversed(self.nodes):
            node.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(60)
        self.nodes.clear()

    def _add(self, num_cpus: int, how: list[str]) -> RayNode:
        number = len(self.nodes)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *how, "--block", f"--num-cpus={num_cpus}",
            f"--dashboard-agent-listen-port={free_ports(1)[0]}", "--disable-usage-stats",
            f'--resources={{"node{number}": 1}}', "--object-store-memory=100000000",
        ]  # fmt: skip
        path = self._folder / f"node{number}.{time.monotonic_ns()}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True, cwd=self._folder
            )
        self._family.sessions.add(process.pid)
        self.nodes.append(RayNode(process, self._family))
        deadline = time.monotonic() + START_TIMEOUT
        while "Ray runtime started" not in (text := path.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a Ray node did not start:\n{text}")
            time.sleep(0.1)
        return self.nodes[-1]
