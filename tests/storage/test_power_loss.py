"""Power fails at any moment: pages that were synced are there, no page is taken for another, and nothing stops a start.

See `docs/durability.md`, which says the same to users.
"""

import errno
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from typing import NamedTuple

import pytest
from support.disk_process import DiskProcess
from support.disks import description
from support.pages import SPEC
from support.power_loss import PowerLoss
from support.processes import start_python

from distkv.frontend.session import Session
from distkv.storage.device import CpuDevice
from distkv.storage.disk import file_lock, page_finder, synced_pages
from distkv.storage.disk import reopen as reopen_module
from distkv.storage.disk.cache_folder import CATALOGUE_LOG
from distkv.storage.disk.catalogue import Catalogue, read_catalogue
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.disk.synced_pages import SyncedPages
from distkv.storage.page_spec import PageSpec
from distkv.workers.cache_place import CachePlace
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.sizes import PoolSizes

NUM_PAGES = 5
NAME = "cache/0123456789abcdef"


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are synced when a test says so, and the disk need not hear of it."""
    monkeypatch.setattr(synced_pages, "SYNC_SECONDS", 1000.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


class Left(NamedTuple):
    """What a loss of power left, and the pages that were certain to stay."""

    folder: Path
    synced: set[int]


def run(path: Path, seed: int, num_steps: int = 14, share: float = 0.15, spec: PageSpec = SPEC) -> list[Left]:
    """Writes, gives up and syncs pages, with clean restarts in any number of slots; power may fail after each call that
    changes anything, and now and then does."""
    rng, cuts = random.Random(seed), random.Random(seed + 1)
    root = path / "disk"
    root.mkdir(parents=True)
    loss, left = PowerLoss(root), []
    synced: set[int] = set()

    def fail() -> None:
        if cuts.random() < share:
            left.append(Left(path / str(loss.num_calls), set(synced)))
            loss.leave(left[-1].folder, cuts)

    loss.called = fail
    with loss.followed():
        process = DiskProcess(root / NAME, NUM_PAGES, spec)
        for key in range(num_steps):
            slot = rng.randrange(process.pool.num_pages)
            if slot in process.keys:
                synced.discard(process.keys[slot])
                process.give_up(slot)
            process.write(slot, key)
            what = rng.random()
            if what < 0.3:
                process.sync()
                synced = set(process.keys.values())
            elif what < 0.4:
                process.kill()
                keys = process.keys
                process = DiskProcess(root / NAME, process.pool.num_pages, spec)
                assert process.keys == keys, "a kill alone loses nothing"
            elif what < 0.6:
                process.close()
                synced = set(process.keys.values())
                num_pages = rng.randrange(2, 8)
                entries, _ = read_catalogue(root / NAME)
                synced &= {int(one.key) for one in entries[max(0, len(entries) - num_pages) :]}
                process = DiskProcess(root / NAME, num_pages, spec)
                assert process.read() == synced, "nothing is lost without a loss of power"
        process.close()
    return left


def check(left: Left, num_pages: int = 8, spec: PageSpec = SPEC) -> int:
    """Starts on what is left, twice; returns how many pages are there."""
    folder = left.folder / NAME
    for again in (False, True):
        process = DiskProcess(folder, num_pages, spec)
        found = process.read()
        if again:
            process.write(0, 99)
        process.close()
        assert left.synced <= found, f"pages that were synced are gone: {left.synced - found}"
    return len(found)


@pytest.mark.usefixtures("no_disk")
def test_what_was_synced_outlives_a_loss_of_power(tmp_path: Path) -> None:
    found = [check(one) for seed in range(3) for one in run(tmp_path / str(seed), seed)]
    assert len(found) > 40 and sum(found) > 40


@pytest.mark.usefixtures("no_disk")
def test_so_does_what_was_synced_and_is_compressed(tmp_path: Path) -> None:
    """Sizes of files say less of what is missing."""
    spec = replace(SPEC, disk_codec="lossless")
    found = [check(one, spec=spec) for one in run(tmp_path, 3, spec=spec)]
    assert len(found) > 10 and sum(found) > 10


def skip_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SyncedPages, "add", lambda self, files: None)


def skip_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synced_pages, "sync_folder", lambda folder: None)


def skip_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    real = synced_pages.sync_file
    monkeypatch.setattr(synced_pages, "sync_file", lambda path: path.name == CATALOGUE_LOG or real(path))


def skip_left_by_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_finder, "WRITE_BACK_SECONDS", -1000.0)


def skip_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reopen_module, "sync_folder", lambda folder: None)


def skip_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "make_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))


@pytest.mark.usefixtures("no_disk")
@pytest.mark.parametrize(
    "skip", [skip_files, skip_left_by_killed, skip_names, skip_catalogue, skip_moves, skip_folders]
)
def test_without_any_one_of_the_syncs_pages_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: Callable[[pytest.MonkeyPatch], None]
) -> None:
    skip(monkeypatch)
    with pytest.raises(AssertionError, match="pages that were synced are gone"):
        for seed in range(6):
            for one in run(tmp_path / str(seed), seed, share=0.3):
                check(one)


def test_a_disk_that_cannot_sync_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else comes of it; a page that was given up meanwhile is no failure."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    process = DiskProcess(tmp_path / NAME, NUM_PAGES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        for key in range(3):
            process.write(key, key)
            process._synced.sync()
    assert caplog.messages == [
        f"{tmp_path / NAME} cannot be synced (Input/output error): a loss of power may take its last pages, which are "
        "computed again then"
    ]
    process.write(3, 3)
    process.pool.chunk_path(3, 0).unlink()
    process.sync()
    assert process.read() == {0, 1, 2} and len(caplog.messages) == 1
    process.close()


@pytest.mark.usefixtures("no_disk")
def test_pages_that_move_to_other_slots_outlive_it_while_somebody_looks_at_the_catalogue(tmp_path: Path) -> None:
    """SQLite, which would sync it as the last one closes it, does not then."""
    root = tmp_path / "disk"
    root.mkdir()
    loss = PowerLoss(root)
    with loss.followed():
        process = DiskProcess(root / NAME, 8)
        process.write(5, 5)
        process.close()
        with closing(Catalogue(root / NAME, read_only=True)):
            process = DiskProcess(root / NAME, 2)
            for number in range(12):
                loss.leave(tmp_path / str(number), random.Random(number))
        process.close()
    for number in range(12):
        check(Left(tmp_path / str(number), {5}))


def test_no_thread_outlives_a_pool_that_could_not_be_made(tmp_path: Path) -> None:
    tier = DiskTier(CachePlace(tmp_path / NAME, "f"), DiskShare.of_all(SPEC), 0, description())
    before = set(threading.enumerate())
    with pytest.raises(MemoryError):
        KVPools(SPEC, PoolSizes(host=1, disk=2**50), CpuDevice(), tier)
    assert "kv-sync" not in [thread.name for thread in set(threading.enumerate()) - before]


# --- a real file system, whose power is switched off ---

SHUT_DOWN, WITHOUT_SYNC = 0x8004587D, 2  # of ext4: nothing that is not on its disk by now gets there

WRITER = """
import random, sys
from pathlib import Path
from support.disk_process import DiskProcess
from distkv.frontend.conversation import Conversation, StoredMessage
from distkv.frontend.session import Session
from distkv.storage.disk import synced_pages

synced_pages.SYNC_SECONDS = 1000.0
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
rng, talk = random.Random(seed), Conversation()
process, session = DiskProcess(folder / "cache/0123456789abcdef", 40), Session(folder / "cache", "trip")
for key in range(10**6):
    slot = rng.randrange(40)
    if slot in process.keys:
        print("gone", process.keys[slot], flush=True)
        process.give_up(slot)
    process.write(slot, key)
    if rng.random() < 0.1:
        process.sync()
        print("synced", *process.keys.values(), flush=True)
    if rng.random() < 0.1:
        talk._messages.append(StoredMessage("user", "x" * rng.randrange(10000)))
        session.go_on_from(talk)
        session.save()
        print("kept", len(talk._messages), flush=True)
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Mounts an ext4 image, anew at each call."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(2**26)

    def command(*words: object) -> None:
        subprocess.run([str(word) for word in words], check=True, capture_output=True)

    def mount() -> Path:
        with suppress(subprocess.CalledProcessError):
            command("umount", folder)
        command("mount", "-o", "loop", image, folder)
        return folder

    try:
        command("mkfs.ext4", "-q", image)
        mount()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine lets us mount no image: {error}")
    yield mount
    command("umount", "--lazy", folder)  # what failed may hold files open


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_real_loss_of_power(mounted: Callable[[], Path], seed: int) -> None:
    folder, rng = mounted(), random.Random(seed)
    writer = start_python(WRITER, str(folder), str(seed))
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(rng.randrange(5, 400))]
    assert all(lines)
    descriptor = os.open(folder, os.O_RDONLY)
    ioctl(descriptor, SHUT_DOWN, struct.pack("I", WITHOUT_SYNC))
    os.close(descriptor)
    lines += writer.stdout.readlines()  # until it finds out
    writer.wait()
    synced, num_kept = set[int](), 0
    for word, *numbers in map(str.split, lines):
        if word == "synced":
            synced = set(map(int, numbers))
        elif word == "gone":
            synced.discard(int(numbers[0]))
        else:
            num_kept = int(numbers[0])
    check(Left(mounted(), synced), 40)
    with Session(folder / "cache", "trip") as session:
        assert len(session.messages) in (num_kept, num_kept + 1), "the last one may be there, and was not reported"
