"""Nodes of a Ray cluster on this machine, each with an address, a host name and a disk of its own, by namespaces of the
kernel: what they share is the processor and the folders that are given to all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.processes import ROOT

START_TIMEOUT = 120.0  # seconds
PORT = 6379
_MADE = ("ip", "link", "add", "name", "br0", "type", "bridge")


def lack() -> str | None:
    """Why this machine cannot have them; None where it can."""
    if os.geteuid():
        return "only root makes namespaces"
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "there is no `ip` or no `nsenter`"
    tried = subprocess.run(["unshare", "-n", "-m", "-u", *_MADE], capture_output=True, text=True)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


def run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


class Nodes:
    """A cluster, whose first node is the head. `disk` is one path, and on each node another folder, below `disks`."""

    def __init__(self, count: int, num_cpus: int = 2):
        self.folder = Path(tempfile.mkdtemp(prefix="dkv", dir="/tmp"))  # a socket's path may not be long
        self.disk = self.folder / "disk"
        self.disks = [self.folder / f"disk{number}" for number in range(count)]
        for folder in (self.disk, *self.disks):
            folder.mkdir()
        self._name = self.folder.name
        self._num_cpus = num_cpus
        self._namespaces: list[str] = []
        self.nodes: list[subprocess.Popen[bytes] | None] = [None] * count
        try:
            switch = self._namespace("switch")
            run("ip", "-n", switch, "link", "add", "name", "br0", "type", "bridge")
            run("ip", "-n", switch, "link", "set", "br0", "up")
            for number in range(count):
                inside = self._namespace(str(number))
                run("ip", "-n", inside, "link", "add", "eth0", "type", "veth", "peer", f"port{number}", "netns", switch)
                run("ip", "-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
                run("ip", "-n", inside, "address", "add", f"{address(number)}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    run("ip", "-n", inside, "link", "set", device, "up")
            for number in range(count):
                self.start(number)
        except BaseException:
            self.close()
            raise

    def start(self, number: int, disk: int | None = None) -> None:
        """Starts a node, with its own disk or another one."""
        mount = f"mount --bind {self.disks[number if disk is None else disk]} {self.disk}"
        own = f"--head --port={PORT} --include-dashboard=false --temp-dir={self.folder}/ray" if not number else ""
        own = own or f"--address={address(0)}:{PORT}"
        command = (
            f"{mount} && hostname node-{number} && exec {sys.executable} -m ray.scripts.scripts start {own} --block "
            f"--num-cpus={self._num_cpus} --node-ip-address={address(number)} --disable-usage-stats "
            f"--object-store-memory=80000000"
        )
        with open(self.folder / f"node{number}.log", "wb") as log:
            self.nodes[number] = subprocess.Popen(
                ["ip", "netns", "exec", f"{self._name}-{number}", "unshare", "-m", "-u", "sh", "-c", command],
                env=self._environment(), stdout=log, stderr=log, start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT
        while b"Ray runtime started" not in (self.folder / f"node{number}.log").read_bytes():
            node = self.nodes[number]
            if node is None or node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / f"node{number}.log").read_text())
            time.sleep(0.2)

    def inside(self, number: int, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Starts a command on a node."""
        node = self.nodes[number]
        assert node is not None
        return subprocess.Popen(
            ["nsenter", "-t", str(node.pid), "-m", "-n", "-u", *map(str, command)],
            env=self._environment(), text=True, cwd=ROOT, **options,
        )  # fmt: skip

    def kill(self, number: int) -> None:
        """Ends a node as a machine ends that loses its power: all of its processes at once."""
        node = self.nodes[number]
        assert node is not None
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if os.getsid(int(entry.name)) == node.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
        node.wait()
        self.nodes[number] = None

    def has_rank(self, number: int) -> bool:
        """Whether a rank of an engine runs on a node."""
        node = self.nodes[number]
        assert node is not None
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                title = (entry / "cmdline").read_bytes()
                if os.getsid(int(entry.name)) == node.pid and title.startswith(b"ray::RankActor"):
                    return True
        return False

    def mount(self, number: int, name: str, num_bytes: int) -> None:
        """Gives a node a small disk, below `disk`."""
        place = self.disk / name
        script = f"mkdir -p {place} && mount -t tmpfs -o size={num_bytes} tmpfs {place}"
        assert self.inside(number, "sh", "-c", script).wait() == 0

    def fill(self, number: int, name: str) -> None:
        """Leaves no room on it."""
        self.inside(
            number, "dd", "if=/dev/zero", f"of={self.disk / name / 'filler'}", "bs=4096", stderr=subprocess.DEVNULL
        ).wait()

    def close(self) -> None:
        """Ends all, and leaves nothing."""
        for number, node in enumerate(self.nodes):
            if node is not None:
                self.kill(number)
        for name in self._namespaces:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def generate(self, meanwhile: Callable[[], None] | None = None, **wanted: Any) -> dict[str, Any]:
        """What a process on the head gets of an engine, see `node_driver.py`.

        Args:
            meanwhile: is called while it answers.
        """
        with open(self.folder / "driver.log", "w") as errors:
            said = json.dumps({"address": f"{address(0)}:{PORT}"} | wanted)
            driver = self.inside(
                0, sys.executable, "-m", "support.node_driver", said,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
            assert driver.stdin is not None and driver.stdout is not None
            try:
                if meanwhile is not None:
                    assert driver.stdout.readline() == "answering\n", (self.folder / "driver.log").read_text()
                    meanwhile()
                out, _ = driver.communicate("go on\n", timeout=300)
            finally:
                driver.kill()
                driver.wait()
        text = (self.folder / "driver.log").read_text()
        assert driver.returncode == 0, text[-8000:]
        return json.loads(out.splitlines()[-1]) | {"log": text}

    def _namespace(self, name: str) -> str:
        self._namespaces.append(f"{self._name}-{name}")
        run("ip", "netns", "add", self._namespaces[-1])
        return self._namespaces[-1]

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{ROOT}:{ROOT / 'tests'}"
        return kept | {
            "HOME": str(self.folder), "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # of kernels
        }  # fmt: skip


def address(number: int) -> str:
    """Of a node."""
    return f"10.77.77.{number + 1}"
