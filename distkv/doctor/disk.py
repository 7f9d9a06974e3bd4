"""The folder for KV pages: which file system it lies on, how much is free there, and how fast it is read."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from distkv.doctor.finding import Finding, fine, problem, warning
from distkv.planner.units import shown_bytes
from distkv.storage.disk.file_lock import FileLock, HeldError
from distkv.storage.disk.mounts import IN_MEMORY, file_system
from distkv.workers.bandwidth import disk_bandwidth

OF_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "ceph", "fuse.sshfs", "gpfs", "9p", "virtiofs")
LEAST_FREE = 2**33  # bytes, of which the engine takes half
LEAST_RATE = 5e8  # bytes per second that a fair SSD reads


def check_disk(folder: Path) -> Iterator[Finding]:
    """Looks at a folder, which is made for the while if it is not there."""
    folder = folder.absolute()
    what = f"disk at {folder}"
    probe = folder / f"doctor-{uuid4().hex}"
    made = [one for one in (folder, *folder.parents) if not os.path.exists(one)]  # which never raises
    try:
        probe.mkdir(parents=True)
    except OSError as error:
        yield problem(what, f"cannot be written ({error.strerror})", "name another folder with --cache-dir")
        return
    try:
        yield from _check_place(what, probe)
        yield from _check_lock(what, probe)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for one in made:
            one.rmdir()


def _check_place(what: str, folder: Path) -> Iterator[Finding]:
    kind, usage = file_system(folder), shutil.disk_usage(folder)
    rate = disk_bandwidth(folder, usage.free)
    said = f"{shown_bytes(usage.free)} of {shown_bytes(usage.total)} are free, {kind}" + (
        f", reads {rate / 1e9:.2f} GB/s" if rate else ", too full to measure"
    )
    if kind in IN_MEMORY:
        yield warning(what, f"{said}: this is memory, which pages are to leave", "name a folder on a disk")
    elif usage.free < LEAST_FREE:
        yield warning(what, said, "make room, or name a folder on a larger disk")
    elif kind in OF_NETWORK:
        yield warning(
            what, f"{said}: a network's file system, on which all nodes share one bandwidth",
            "name a folder on a disk of the node (NVMe, say), the same path on each",
        )  # fmt: skip
    elif rate and rate < LEAST_RATE:
        yield warning(what, f"{said}: each cold page takes that long", "name a folder on an SSD")
    elif os.stat(folder).st_dev == os.stat("/").st_dev:
        yield warning(
            what, f"{said}: the system's own disk, which the system and its logs need too",
            "name a folder on a disk of its own, or set disk_kv_bytes so that room is left",
        )  # fmt: skip
    else:
        yield fine(what, said)


def _check_lock(what: str, folder: Path) -> Iterator[Finding]:
    cure = "name a folder whose file system has locks: without them an engine that stands still loses it to another one"
    try:
        lock = FileLock(folder / "lock")
    except (OSError, HeldError) as error:
        yield problem(what, f"files there cannot be locked ({error})", cure)
        return
    if not lock.keeps_others_out:
        yield warning(what, "a lock there keeps nobody out", cure)
    lock.release()
