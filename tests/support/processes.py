"""Python in a process of its own, which runs in the root of the checkout and finds `distkv` and `support`."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def run_code(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs code to its end, whatever that is."""
    return subprocess.run(_command(code, arguments), capture_output=True, **_setting())


def run_python(code: str) -> str:
    """Runs code; returns what it prints. Fails with what it said when it does."""
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """Starts code, which may be talked to: `read_line` waits for what it prints."""
    return subprocess.Popen(_command(code, arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **_setting())


def read_line(process: "subprocess.Popen[str]") -> str:
    """The next line that the process prints; empty when it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]") -> None:
    """Ends a process with SIGKILL."""
    process.kill()
    process.communicate()


def set_session_priority(pid: int, niceness: int) -> None:
    """Gives the session of a process a niceness. Where Linux has autogroups (`sched(7)`) it shares cores out among
    sessions first, and the niceness of processes matters only within one."""
    with suppress(OSError):  # there are no autogroups
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


def listening(pid: int) -> list[str]:
    """The addresses of IPv4 and IPv6 that a process listens at, as `/proc` has them: "0100007F" is 127.0.0.1."""
    descriptors = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    found = []
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in descriptors:
                found.append(fields[1].partition(":")[0])
    return sorted(found)


def _command(code: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def _setting() -> dict[str, Any]:
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"cwd": ROOT, "text": True, "env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)}}
