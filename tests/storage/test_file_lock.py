"""One owner of a folder at a time, also where the kernel's locks do not reach other nodes."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import IO

import pytest
from support.disk_process import DiskProcess
from support.disks import share
from support.nodes import enter_node
from support.pages import SPEC, load, random_page, same
from support.processes import kill, read_line, start_python

from distkv.storage.device import CpuDevice
from distkv.storage.disk import file_lock
from distkv.storage.disk.cache_folder import LOCK, SCRATCH, FolderLock, InUseError
from distkv.storage.disk.file_lock import FileLock, HeldError, Holder, is_locked
from distkv.storage.disk.page_arrays import ARRAY, DiskShare
from distkv.storage.errors import ConfigError
from distkv.workers.cache_place import CachePlace, join_folder
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.sizes import PoolSizes

NAME = "0123456789abcdef"

OWNER = """
import sys, time
from pathlib import Path
from support.nodes import enter_node
from distkv.storage.disk.cache_folder import FolderLock

enter_node(*sys.argv[2:4])
lock = FolderLock(Path(sys.argv[1]), "engine of " + sys.argv[2])
print("locked", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
"""

Start = Callable[[str, str], "Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With pages of three keys."""
    process = DiskProcess(tmp_path / NAME, 8)
    for slot in (0, 3, 5):
        process.write(slot, slot)
    process.close()
    return tmp_path / NAME


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Has another node's engine lock the folder."""
    started = []

    def start(node: str, locks: str) -> "Popen[str]":
        started.append(start_python(OWNER, folder, node, locks))
        assert read_line(started[-1]) == "locked"
        return started[-1]

    yield start
    for process in started:
        kill(process)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and LOCK not in path.name}


@pytest.mark.parametrize("locks", ["none", "of the node", "of all"])
def test_a_second_engine_is_refused_and_wipes_nothing(
    folder: Path, start: Start, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the first one has been killed, it takes over, with the pages, and nobody need help."""
    before = files(folder)
    first = start("a", locks)
    enter_node("b", locks, monkeypatch)
    for _ in range(2):
        with pytest.raises(InUseError, match=f"in use by process {first.pid} on .*; end that") as caught:
            DiskProcess(folder, 8)
        assert caught.value.owner == "engine of a" and is_locked(folder / LOCK)
    assert files(folder) == before
    kill(first)
    monkeypatch.setattr(file_lock, "SILENCE_SECONDS", 0.2)
    process = DiskProcess(folder, 8)
    assert process.read() == {0, 3, 5}
    process.close()


@pytest.mark.parametrize("locks", ["none", "of the node", "of all"])
def test_a_lock_that_was_released_is_free_at_once(
    folder: Path, start: Start, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start("a", locks)
    assert first.stdin is not None
    first.stdin.write("\n")
    first.stdin.flush()
    assert read_line(first) == "released"
    enter_node("b", locks, monkeypatch)
    monkeypatch.setattr(FileLock, "_wait_for_silence", None)
    assert not is_locked(folder / LOCK)
    FolderLock(folder).release()


def test_a_lock_that_is_released_while_its_holder_is_listened_for_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_node("b", "none", monkeypatch)
    path = tmp_path / LOCK
    path.write_text("process 7 on a\na engine of a\n")
    sleep = file_lock.time.sleep

    def release(seconds: float) -> None:
        monkeypatch.setattr(file_lock.time, "sleep", sleep)
        path.write_text("")

    monkeypatch.setattr(file_lock.time, "sleep", release)
    FileLock(path, "engine of b").release()


@pytest.mark.parametrize("is_shared", [False, True])
def test_on_a_full_disk_the_lock_is_enough_where_nobody_can_pass_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    """Where locks may not reach others, the nonce that has no room there is all that would keep them out."""

    def write(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if is_shared:
        enter_node("a", "of the node", monkeypatch)
    monkeypatch.setattr(os, "write", write)
    if is_shared:
        with pytest.raises(ConfigError, match=r"cannot be used \(No space left on device\)"):
            FolderLock(tmp_path)
    else:
        FolderLock(tmp_path).release()


def test_of_a_holder_on_the_same_kernel_the_lock_says_enough(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start("a", "of the node")
    enter_node("a", "of the node", monkeypatch)
    monkeypatch.setattr(FileLock, "_wait_for_silence", None)
    with pytest.raises(InUseError):
        FolderLock(folder)
    kill(first)
    assert not is_locked(folder / LOCK)
    FolderLock(folder).release()


def test_on_a_disk_of_the_node_a_loss_of_power_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text("process 7 on node\nkernel-that-was engine\n")
    monkeypatch.setattr(FileLock, "_wait_for_silence", None)
    assert not is_locked(tmp_path / LOCK)
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("is_released", [True, False])
def test_a_file_that_its_holder_has_removed_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_released: bool
) -> None:
    """Who has opened it before locks the one that has the name now, and is not alone with one that has none."""
    first, take = FileLock(tmp_path / LOCK), file_lock._take

    def remove_and_take(file: IO[str]) -> None:
        monkeypatch.setattr(file_lock, "_take", take)
        (tmp_path / LOCK).unlink()
        if is_released:
            first.release()
        take(file)

    monkeypatch.setattr(file_lock, "_take", remove_and_take)
    second = FileLock(tmp_path / LOCK)
    first.release()
    with pytest.raises(HeldError, match=f"process {os.getpid()}"):
        FileLock(tmp_path / LOCK)
    second.release()


def test_of_two_that_see_it_free_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_node("b", "none", monkeypatch)
    path = tmp_path / LOCK
    with monkeypatch.context() as patch:
        patch.setattr(file_lock.time, "sleep", lambda seconds: path.write_text("process 7 on a\na engine of a\n"))
        with pytest.raises(HeldError, match="process 7 on a"):
            FileLock(path)
    assert path.read_text() == "process 7 on a\na engine of a\n"


def test_a_file_that_is_removed_while_others_are_waited_for_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_node("b", "none", monkeypatch)
    path, sleep = tmp_path / LOCK, file_lock.time.sleep

    def remove(seconds: float) -> None:
        monkeypatch.setattr(file_lock.time, "sleep", sleep)
        path.unlink()

    monkeypatch.setattr(file_lock.time, "sleep", remove)
    lock = FileLock(path, "engine of b")
    assert Holder.read(path).owner == "engine of b"
    lock.release()


def test_a_file_that_is_always_removed_is_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whose."""

    def removed(file: IO[str]) -> None:
        (tmp_path / LOCK).unlink()
        raise BlockingIOError

    monkeypatch.setattr(file_lock, "_take", removed)
    with pytest.raises(HeldError, match=r"^another process$"):
        FileLock(tmp_path / LOCK)


def test_who_was_taken_over_finds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enter_node("b", "none", monkeypatch)
    before = threading.enumerate()
    lock = FileLock(tmp_path / LOCK)
    (tmp_path / LOCK).write_text("process 7 on a\na engine of a\n")
    [thread] = [one for one in threading.enumerate() if one.name == "lock-beat" and one not in before]
    thread.join()
    assert "process 7 on a took" in caplog.text
    lock.release()
    assert (tmp_path / LOCK).read_text() == "process 7 on a\na engine of a\n", "the other has it still"


def test_who_was_taken_over_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine whose pages would go with it."""

    def engine() -> KVPools:
        tier = DiskTier(CachePlace(tmp_path / SCRATCH), DiskShare.of_all(SPEC), 0, None, is_alone=True)
        return KVPools(SPEC, PoolSizes(host=1, disk=4), CpuDevice(), tier)

    enter_node("a", "none", monkeypatch)
    monkeypatch.setattr(file_lock, "BEAT_SECONDS", 1000.0)
    stood_still = engine()
    enter_node("b", "none", monkeypatch)
    monkeypatch.setattr(file_lock, "SILENCE_SECONDS", 0.1)
    other = engine()
    assert other.disk is not None
    other.disk.store(2, random_page(SPEC, 2))
    stood_still.close()
    assert same(load(other.disk, 2), random_page(SPEC, 2))
    other.close()
    assert not (tmp_path / SCRATCH / ARRAY).exists()


def test_where_there_are_no_such_locks_the_nonce_keeps_others_out(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("a", "of all")

    def refuse(file: object, command: int, lock: bytes) -> bytes:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    enter_node("b", "of all", monkeypatch)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(InUseError):
        FolderLock(folder)


def test_a_rank_knows_the_first_one_of_its_engine_by_the_lock(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does not see the other's file yet."""
    start("a", "of the node")
    enter_node("b", "of the node", monkeypatch)
    with join_folder(CachePlace(folder, "f", engine="engine of a"), share(SPEC, 1, 3)) as found:
        assert found.lock is None and found.writes
    with pytest.raises(InUseError), join_folder(CachePlace(folder, "f"), share(SPEC, 1, 3)):
        pass


def test_who_looks_takes_nothing(tmp_path: Path) -> None:
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            is_locked(tmp_path / LOCK)

    FolderLock(tmp_path).release()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(300):
            FolderLock(tmp_path).release()
    finally:
        end.set()
        thread.join()
