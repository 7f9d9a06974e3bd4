"""Which processes of this machine belong to a bench, whatever they have become: it is shared with others."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "DISTKV_RELIABILITY"  # a variable that all that a bench starts inherits


@dataclass
class Family:
    """All processes that descend from those that were started with `environment`, in sessions that are noted here."""

    mark: str
    variables: dict[str, str] = field(default_factory=dict)
    sessions: set[int] = field(default_factory=set)
    segments: set[str] = field(default_factory=set)  # shared memory that they were seen to use

    @property
    def environment(self) -> dict[str, str]:
        # kernels that have been built lie below the user's own home
        caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return {MARK: self.mark, "XDG_CACHE_HOME": caches, **self.variables}

    def members(self) -> dict[int, str]:
        """Their titles by process id. Those that are gone but for their exit status do not count."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if self._is_ours(entry) and (title := (entry / "cmdline").read_bytes()):
                        found[int(entry.name)] = title.split(b"\0\0")[0].replace(b"\0", b" ").decode().strip()
        return found

    def note_segments(self) -> None:
        """Notes which named shared memory they use now."""
        for pid in self.members():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    if "/dev/shm/" in line and not line.endswith("(deleted)"):
                        self.segments.add("/dev/shm/" + line.partition("/dev/shm/")[2])

    def left_segments(self) -> list[str]:
        """Of the noted memory, what has a name still."""
        return sorted(name for name in self.segments if Path(name).exists())

    def kill_all(self) -> None:
        """Ends them with SIGKILL, until there are none."""
        deadline = time.monotonic() + 30
        while (members := self.members()) and time.monotonic() < deadline:
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _is_ours(self, entry: Path) -> bool:
        if os.getsid(int(entry.name)) in self.sessions:
            return True
        # a title that is set anew may lie over the environment, hence the sessions
        return f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
