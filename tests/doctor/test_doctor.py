"""`distkv doctor` tells what is wrong with a machine, and how that is mended."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.processes import ROOT
from support.ray_cluster import Cluster

from distkv.doctor import disk, gpu, processor
from distkv.doctor.cluster import check_cluster
from distkv.doctor.doctor import run
from distkv.doctor.finding import Finding, State
from distkv.errors import ConfigError
from distkv.kernels.native.build import BuildError
from distkv.storage.disk import file_lock, mounts


def doctor(*options: str, **limits: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distkv", "doctor", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **limits)


def test_a_machine_with_a_tight_limit(tmp_path: Path) -> None:
    figures = tmp_path / "found.json"

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 1000))

    ended = doctor("--cache-dir", str(tmp_path / "a" / "kv"), "--json", str(figures), preexec_fn=few_files)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "warning open files: 200 at most\n         ulimit -n 4096 or more" in ended.stdout
    assert "0 problems" in ended.stdout.splitlines()[-1]
    found = {row["what"]: row for row in json.loads(figures.read_text())["rows"]}
    assert found["open files"]["state"] == "warning" and "1000" in found["open files"]["cure"]
    assert found["packages"]["state"] == "ok" and torch.__version__ in found["packages"]["said"]
    assert list(tmp_path.iterdir()) == [figures], "folders that were made for the while are gone"


def test_what_does_not_work_has_exit_code_1() -> None:
    ended = doctor("--cache-dir", "/proc/kv", "--ray-address", "127.0.0.1:1")
    assert ended.returncode == 1
    assert "problem disk at /proc/kv: cannot be written" in ended.stdout
    assert "problem Ray: " in ended.stdout and "127.0.0.1:1" in ended.stdout
    assert "2 problems" in ended.stdout.splitlines()[-1] and not ended.stderr


def test_a_folder_in_memory_is_no_disk() -> None:
    place = Path("/dev/shm") / f"distkv-{os.getpid()}"
    [found, *_] = disk.check_disk(place)
    assert found.state == State.WARNING and "tmpfs" in found.said and "this is memory" in found.said
    assert not place.exists()


def test_file_systems_are_told_by_the_innermost_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(mounts, "MOUNTS", table)
    table.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"23 22 0:5 / {tmp_path} rw shared:1 - xfs /dev/nvme0n1 rw\n"
        f"24 23 0:6 / {tmp_path}/with\\040space rw - nfs4 server:/x rw\n"
        f"25 23 0:7 / {tmp_path}/over rw - ext4 /dev/sdb rw\n26 25 0:8 / {tmp_path}/over rw - tmpfs tmpfs rw\n"
    )
    for place, kind in (("", "xfs"), ("with space/kv", "nfs4"), ("over", "tmpfs"), ("overt", "xfs"), ("..", "ext4")):
        assert mounts.file_system(tmp_path / place) == kind


def test_a_folder_that_cannot_be_is_a_problem() -> None:
    [found] = disk.check_disk(Path("x" * 300))
    assert found.state == State.PROBLEM and "name too long" in found.said and "--cache-dir" in found.cure


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))])
def test_locks_that_keep_nobody_out_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """They have no effect, or there are none; what says so is the kernel."""

    def answer(file: object, command: int, lock: bytes) -> bytes:
        if error is not None:
            raise error
        return file_lock._whole_file(fcntl.F_UNLCK)

    monkeypatch.setattr(file_lock, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(fcntl, "fcntl", answer)
    *_, found = disk.check_disk(tmp_path)
    assert (found.state, found.said) == (State.WARNING, "a lock there keeps nobody out")


def test_slow_full_and_distant_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**changes: Any) -> str:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(disk, name, value)
            [found, *_] = disk.check_disk(tmp_path)
        assert found.state == State.WARNING and found.cure
        return found.said

    assert "a network's file system" in said(file_system=lambda folder: "nfs4")
    assert "reads 0.10 GB/s: each cold page takes that long" in said(disk_bandwidth=lambda folder, room: 1e8)
    assert "GiB are free" in said(LEAST_FREE=2**60)


def test_what_is_missing_is_named_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "PACKAGES", {"torch": "", "no-such-package": "nothing"})
    [found] = processor.check_packages()
    assert found.state == State.PROBLEM and "no-such-package (for nothing)" in found.said


def test_kernels_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BuildError("there is no compiler")

    monkeypatch.setattr(processor, "load_best", fail)
    monkeypatch.setattr(processor.shutil, "which", lambda name: None)
    *_, found = processor.check_processor()
    assert found.state == State.WARNING and "no compiler" in found.said and "apt install g++" in found.cure


def test_small_and_missing_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, missing = processor.check_memory(tmp_path / "shm")
    assert missing.state == State.WARNING and "cannot be used" in missing.said
    monkeypatch.setattr(processor, "LEAST_SHARED_BYTES", 2**60)
    *_, small = processor.check_memory(tmp_path)
    assert small.state == State.WARNING and "--shm-size" in small.cure


def test_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Finding:
        [one] = gpu.check_gpus()
        return one

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "DRIVER", tmp_path / "nvidiactl")
    assert found().state == State.OK
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert found().state == State.PROBLEM and "is built for CPUs" in found().said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert found().state == State.PROBLEM and "update the driver" in found().cure


def test_gpus_that_are_old_or_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities, free = [(7, 5), (9, 0), (9, 0)], [1, 10 * 2**30, 80 * 2**30]
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_name": lambda index: f"GPU-{index}",
        "get_device_capability": capabilities.__getitem__,
        "mem_get_info": lambda index: (free[index], 80 * 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    class Pinned:
        def __init__(self, *_: Any, pinned: bool):
            assert pinned

        def close(self) -> None: ...

    monkeypatch.setattr(gpu, "HostBuffer", Pinned)
    found = list(gpu.check_gpus())
    assert [one.state for one in found] == [State.PROBLEM, State.WARNING, State.OK, State.OK]
    assert "7.5" in found[0].said and "10.0 GiB of 80.0 GiB" in found[1].said

    def refuse(*_: Any, pinned: bool) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(gpu, "HostBuffer", refuse)
    assert list(gpu.check_gpus())[-1].state == State.PROBLEM


@pytest.mark.ray
def test_a_cluster_is_looked_at_and_left(cluster: Cluster) -> None:
    [found] = check_cluster(cluster.address)
    assert found.state == State.OK and "1 nodes" in found.said and "CPUs free" in found.said


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        run(Console(), tmp_path, None, tmp_path / "none" / "found.json")
