"""CPU time of a process group, so that an engine which waits is known to wait."""

import os
import time
from pathlib import Path

IDLE = 0.1  # of a core
WINDOW = 0.2  # seconds that this is measured over
PATIENCE = 5.0  # seconds


def group_cpu_seconds(group: int) -> float:
    """CPU seconds of all processes of a group that are alive, by Linux's `/proc`."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def await_idle(group: int) -> None:
    """Returns when the group does nothing any more, or after `PATIENCE`: threads of OpenMP and processes that wait for
    messages stay awake for up to a second, and would take cores from whoever has the next turn."""
    deadline = time.monotonic() + PATIENCE
    before = group_cpu_seconds(group)
    while time.monotonic() < deadline:
        time.sleep(WINDOW)
        now = group_cpu_seconds(group)
        if now - before < IDLE * WINDOW:
            return
        before = now
