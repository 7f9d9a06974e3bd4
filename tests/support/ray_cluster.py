"""A real Ray cluster on this machine whose Python has distkv's dependencies but not distkv itself."""

import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.processes import set_session_priority

NUM_CPUS = 4  # of the cluster that tests share
START_TIMEOUT = 120.0  # seconds
TOO_SLOW = "timed out during startup"  # a head node gives itself half a minute, and no option changes that
PORTS = range(20_000, 32_000)  # below those that Linux gives to who asks for any, above those of Ray's workers
_sessions = {os.getsid(0)}  # of processes that belong to clusters of these tests, and not to somebody else's


@dataclass(frozen=True)
class Cluster:
    """Where the cluster answers, and the environment in which its own commands run."""

    address: str
    dashboard: str
    python: Path
    environment: dict[str, str]

    def ray(self, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        """Runs the command `ray` with the cluster's Python."""
        command = [str(self.python), "-m", "ray.scripts.scripts", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)


def start(folder: Path, num_cpus: int) -> tuple[Cluster, subprocess.Popen[bytes]]:
    """Starts a head node in a process group of its own; `folder` becomes its HOME (Ray writes a token there)."""
    python, deadline = _bare_python(folder / "venv"), time.monotonic() + START_TIMEOUT
    while True:
        cluster, head = _start_head(folder, python, num_cpus)
        # the note comes late, and to ask for jobs takes a Python that imports Ray
        while head.poll() is None and time.monotonic() < deadline:
            if _is_noted(cluster) and cluster.ray("job", "list", "--address", cluster.dashboard).returncode == 0:
                return cluster, head
            time.sleep(0.5)
        stop(head)
        log = (folder / "ray.log").read_text()
        if TOO_SLOW not in log or time.monotonic() > deadline:
            raise RuntimeError(f"the Ray cluster did not start:\n{log}")


def _start_head(folder: Path, python: Path, num_cpus: int) -> tuple[Cluster, subprocess.Popen[bytes]]:
    """Begins to start one; see `start`."""
    gcs, dashboard, client, agent = free_ports(4)
    hidden = ("RAY_", "PYTHONPATH", "HOME", "PATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"HOME": str(folder), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment["RAY_metrics_report_interval_ms"] = "1000"  # else tests would wait for ten seconds
    if (folder / ".ray" / "auth_token").exists():
        environment["RAY_AUTH_MODE"] = "token"  # else Ray's other commands would not send it
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", python, environment)
    command = [
        str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={num_cpus}",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    with open(folder / "ray.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    _note_session(head)
    return cluster, head


def join(cluster: Cluster, folder: Path, num_cpus: int) -> subprocess.Popen[bytes]:
    """Starts one more node, in a process group of its own; `stop` ends it. It has a resource "second"."""
    command = [
        str(cluster.python), "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--block",
        f"--num-cpus={num_cpus}", '--resources={"second": 1}', "--disable-usage-stats",
        f"--dashboard-agent-listen-port={free_ports(1)[0]}",  # that of jobs, which would be one for all clusters
        "--object-store-memory=100000000",
    ]  # fmt: skip
    with open(folder / "node.log", "wb") as log:
        node = subprocess.Popen(
            command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    _note_session(node)
    return node


def stop(head: subprocess.Popen[bytes]) -> None:
    """Ends the head node and everything it started."""
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Ends a node as a machine ends that loses its power: all of its processes at once."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == node.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    node.wait()


def rank_processes() -> dict[str, list[int]]:
    """Process ids of rank actors of these tests by what they run: "lead", "follow", or "" between calls."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            is_ours = os.getsid(int(entry.name)) in _sessions
        except OSError:
            continue  # it has just ended
        if is_ours and title.startswith("ray::RankActor"):
            found.setdefault(title.partition(".")[2].strip(), []).append(int(entry.name))
    return found


def await_no_ranks() -> dict[str, list[int]]:
    """Rank processes that are still there after a minute; one that was killed takes a moment to leave."""
    deadline = time.monotonic() + 60
    while (found := rank_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _note_session(leader: subprocess.Popen[bytes]) -> None:
    """Notes that a new session is one of these tests, and gives it the priority of this process."""
    _sessions.add(leader.pid)
    set_session_priority(leader.pid, os.getpriority(os.PRIO_PROCESS, 0))


def _bare_python(folder: Path) -> Path:
    """A virtual environment that sees this one's packages by path, so that no editable install takes effect."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    python = folder / "bin" / "python"
    found = subprocess.run([str(python), "-E", "-c", "import distkv"], capture_output=True, cwd=folder)
    assert found.returncode, "distkv must not be installed in the cluster's environment"
    return python


def _is_noted(cluster: Cluster) -> bool:
    """Whether `ray start` has noted the cluster as the last of this machine, which it does when all runs."""
    note = Path(os.environ.get("TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return note.exists() and note.read_text().strip().endswith(cluster.address.removeprefix("127.0.0.1"))


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at, nor is given before they are used."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            found.append(port)
    return found
