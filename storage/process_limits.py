"""What of the machine this process may use: the box that it runs in, not the machine alone.

A control group bounds the memory and the processor time of the processes in it and in the groups below it, so the least
of all groups from ours up to the root counts. Version 2 has one tree of groups, version 1 one for each controller.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from distkv.storage.proc_files import read_mounts, read_text

PROC = Path("/proc")
NO_MEMORY = (  # what libraries say, of errors that have no kind of their own
    "can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "failed to map segment",
    "can't start new thread",
)  # fmt: skip


def available_bytes(proc: Path = PROC) -> int:
    """Memory that can be taken without swapping, within the limits of our control groups and of this process's address
    space. Files that are cached and not in use count as free, since the system gives them up."""
    fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    rooms = [int(fields["MemAvailable"].split()[0]) * 1024]
    for group in _groups("memory", proc):
        rooms += _memory_rooms(group)
    limit = address_space()
    if limit is not None:
        taken = int(_read(proc / "self/statm").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        rooms.append(limit - taken)
    return max(0, min(rooms))


def address_space() -> int | None:
    """Bytes that this process may map (`ulimit -v`); None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def lack_of_memory(error: BaseException) -> str | None:
    """What is to be said of an error that means that there is no memory to be had; None for any other error."""
    said = " ".join(str(error).split())
    is_plain = isinstance(error, RuntimeError | ImportError | OSError) and any(one in said for one in NO_MEMORY)
    if not (isinstance(error, MemoryError) or is_plain):
        return None
    limit = address_space()
    cure = "free some, or give the tiers less" if limit is None else f"raise the limit of {limit} bytes (ulimit -v)"
    return f"there is no memory to go on with ({said or type(error).__name__}); {cure}"


def usable_cores(proc: Path = PROC) -> int:
    """Cores that this process may keep busy: those that it may run on, or what the quotas of our control groups come to
    where that is less, and one at least."""
    quotas = [quota for group in _groups("cpu", proc) for quota in _quotas(group)]
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def _memory_rooms(group: Path) -> Iterator[int]:
    """What the limits of a group leave."""
    for limits, used, cached in (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        for limit in limits:
            text = _read(group / limit)
            if text and text != "max":
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                yield int(text) - int(_read(group / used) or 0) + int(stat.get(cached, 0))


def _quotas(group: Path) -> Iterator[float]:
    """Cores that a group may keep busy."""
    text = _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    quota, _, period = text.partition(" ")
    if quota.isdigit():  # else "max", or -1 in version 1
        yield int(quota) / int(period)


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """The folders of our groups from our own up to the root, in each tree that may have the controller."""
    paths: dict[str, PurePosixPath] = {}  # by controller, "" for version 2
    for line in filter(None, read_text(proc / "self/cgroup").split("\n")):
        _, controllers, name = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), PurePosixPath(name))
    for mount in read_mounts(proc / "self/mountinfo"):
        own = paths.get("") if mount.kind == "cgroup2" else None
        if mount.kind == "cgroup" and controller in mount.options:
            own = paths.get(controller)
        if own is None:
            continue
        group = top = mount.point
        if own.is_relative_to(mount.root) and ".." not in own.parts:  # else a container sees its part of the tree alone
            group = top / own.relative_to(mount.root)
        yield from [group, *(one for one in group.parents if one.is_relative_to(top))]


def _read(path: Path) -> str:
    """The text of a file without the ends of lines around it, empty where there is none for us."""
    return read_text(path).strip()
