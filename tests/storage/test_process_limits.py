"""What a process may use where control groups say so, in trees of both versions as Docker, Slurm and systemd have."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from distkv.storage.process_limits import available_bytes, lack_of_memory, usable_cores

GIB = 2**30
TOP_V1 = 9223372036854771712


class Machine:
    """A made-up `/proc` and the groups it names."""

    def __init__(self, folder: Path):
        self.folder, self.proc = folder, folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {22 * 2**20} kB\n")

    def mount(self, groups: str, *mounts: tuple[str, str, str]) -> None:
        """`mounts` are (root, mount point, type with options)."""
        (self.proc / "self/cgroup").write_bytes(os.fsencode(groups))
        lines = [f"31 23 0:28 {root} {self.folder}{point} rw - {kind}\n" for root, point, kind in mounts]
        table = "22 1 8:1 / / rw - ext4 /dev/root rw\n" + "".join(lines)
        (self.proc / "self/mountinfo").write_bytes(os.fsencode(table))

    def write(self, group: str, **files: object) -> None:
        folder = self.folder / group.removeprefix("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_it_is_the_machine(machine: Machine) -> None:
    assert available_bytes(machine.proc) == 22 * GIB
    assert usable_cores(machine.proc) == len(os.sched_getaffinity(0))
    assert 0 < available_bytes() < 2**60 and 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_a_nested_group_of_version_2_and_what_is_above_it(machine: Machine) -> None:
    """The least room of all counts, at whichever height; cached files can be given up."""
    machine.mount("0::/system.slice/slurm/job/step\n", ("/", "/cg", "cgroup2 cgroup2 rw"))
    machine.write("/cg/system.slice/slurm/job/step", memory__max="max", memory__high="max", memory__current=5 * GIB)
    machine.write("/cg/system.slice/slurm/job", memory__max=8 * GIB, memory__current=7 * GIB, memory__high="max")
    machine.write("/cg/system.slice/slurm/job", memory__stat=f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 5")
    machine.write("/cg/system.slice", memory__max=40 * GIB, memory__current=30 * GIB)
    assert available_bytes(machine.proc) == 3 * GIB
    machine.write("/cg/system.slice", memory__high=31 * GIB)
    assert available_bytes(machine.proc) == 1 * GIB
    machine.write("/cg/system.slice/slurm/job/step", memory__max=4 * GIB)
    assert available_bytes(machine.proc) == 0, "over its limit already"


def test_a_group_of_version_1(machine: Machine) -> None:
    groups = "4:memory:/user/job\n1:cpu,cpuacct:/user/job\n0::/\n"
    machine.mount(
        groups,
        ("/", "/cg/memory", "cgroup cgroup rw,memory"),
        ("/", "/cg/cpu", "cgroup cgroup rw,cpu,cpuacct"),
        ("/", "/cg/unified", "cgroup2 cgroup2 rw"),
    )
    machine.write("/cg/memory/user/job", memory__limit_in_bytes=TOP_V1, memory__usage_in_bytes=GIB)
    machine.write("/cg/memory/user", memory__limit_in_bytes=GIB // 2, memory__usage_in_bytes=GIB // 4)
    assert available_bytes(machine.proc) == GIB // 4
    machine.write("/cg/memory/user", memory__stat=f"inactive_file 7\ntotal_inactive_file {GIB // 8}")
    assert available_bytes(machine.proc) == GIB // 4 + GIB // 8
    machine.write("/cg/cpu/user/job", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert usable_cores(machine.proc) == len(os.sched_getaffinity(0))
    machine.write("/cg/cpu/user", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert usable_cores(machine.proc) == 1


@pytest.mark.parametrize("path", ["/docker/ab12", "/", "/../neighbour"])
def test_a_container_sees_its_own_part_of_the_tree(machine: Machine, path: str) -> None:
    root = "/docker/ab12" if path.startswith("/docker") else "/"
    machine.mount(f"0::{path}\n", (root, "/cg", "cgroup2 cgroup2 rw"))
    machine.write("/cg", memory__max=2 * GIB, memory__current=GIB, cpu__max="50000 100000")
    assert available_bytes(machine.proc) == GIB
    assert usable_cores(machine.proc) == 1


@pytest.mark.parametrize("name", ["a b", "a\\b", "a\u2028b\x85", "a\xa0", os.fsdecode(b"a\xffb")])
def test_names_and_mounts_of_any_kind(machine: Machine, name: str) -> None:
    """A group of that name, in a tree that is mounted at that name, below mounts of nothing (`mount -t tmpfs ""`)."""
    point = f"/{name}".replace("\\", "\\134").replace(" ", "\\040")
    machine.mount(f"0::/{name}", ("/", "/x", "tmpfs  rw"), ("/", point, "cgroup2 cgroup2 rw"), ("/", "/y", "tmpfs  rw"))
    machine.write(f"/{name}/{name}", memory__max=2 * GIB, memory__current=GIB, cpu__max="50000 100000")
    assert available_bytes(machine.proc) == GIB
    assert usable_cores(machine.proc) == 1


def test_affinity_bounds_the_cores(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    machine.mount("0::/job\n", ("/", "/cg", "cgroup2 cgroup2 rw"))
    for text, cores in (("max 100000", 12), ("800000 100000", 8), ("2000000 100000", 12), ("20000 100000", 1)):
        machine.write("/cg/job", cpu__max=text)
        assert usable_cores(machine.proc) == cores


def test_a_limit_of_the_address_space(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mapped counts, touched or not."""
    (machine.proc / "self/statm").write_text(f"{3 * GIB // resource.getpagesize()} 100 50 1 0 90 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (5 * GIB if which == resource.RLIMIT_AS else 64, -1))
    assert available_bytes(machine.proc) == 2 * GIB
    assert "raise the limit of 5368709120 bytes (ulimit -v)" in (lack_of_memory(MemoryError()) or "")


def test_errors_that_mean_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**50, dtype=torch.uint8)
    for error in (MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), of_torch.value):
        assert (lack_of_memory(error) or "").startswith("there is no memory to go on with (")
    for error in (RuntimeError("shapes differ"), ImportError("no such module"), ValueError("std::bad_alloc")):
        assert lack_of_memory(error) is None
