"""What is asked of the disk before pages lie there: how much is free where the ranks write, and how fast it is."""

import errno
import os
import shutil
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.disks import description, disk_pool
from support.llms import PAGE_BYTES, tiered_options
from support.pages import SPEC

from distkv.config import EngineConfig
from distkv.launch.launch import set_up
from distkv.storage.disk import scratch
from distkv.storage.disk.cache_folder import SCRATCH, describe
from distkv.storage.disk.page_arrays import ARRAY, DiskShare
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier
from distkv.workers import bandwidth, cache_place
from distkv.workers.bandwidth import PROBE_BYTES, READ_BYTES, measure_bandwidth
from distkv.workers.cache_place import CachePlace, Joined, free_bytes, join_folder
from distkv.workers.errors import ConfigError
from distkv.workers.group.local_group import LocalGroup
from distkv.workers.model.model_config import ModelConfig


def has_lock_and_writes(joined: Joined) -> tuple[bool, bool]:
    return joined.lock is not None, joined.writes


def of_head(head: int) -> DiskShare:
    return DiskShare((head, head + 1), 2, (0, 1), 1)


def test_free_bytes_while_others_remove_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scan = tmp_path / "cache", os.scandir
    (folder / ARRAY).mkdir(parents=True)
    for slot in range(8):
        (folder / ARRAY / f"c.{slot}.0.0.0.0.0").write_bytes(bytes(2**20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # others write meanwhile

    class Removed:
        """The entries of a folder, of which every other one is gone by now."""

        def __init__(self, path: Path):
            with scan(path) as files:
                self.files = list(files)
            for file in self.files[::2]:
                os.unlink(file.path)

        def __enter__(self) -> Any:
            return iter(self.files)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Removed)
    assert free_bytes(folder) - usage.free >= 4 * 2**20
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert free_bytes(folder) > 0, "the folder is not there yet, or no more"


def test_pages_that_are_compressed_have_room_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what counts as free has a slot for each, though the disk is full."""
    spec = replace(SPEC, disk_codec="lossless", page_size=128)
    pool = disk_pool(tmp_path, spec)
    describe(tmp_path, description(spec))
    for slot in range(7):
        pool.store(slot, torch.zeros(spec.page_shape))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=0))
    assert sum(file.stat().st_size for file in (tmp_path / ARRAY).iterdir()) < 4 * spec.page_bytes
    assert free_bytes(tmp_path) // 2 // spec.page_bytes_in(Tier.DISK) == 7


def test_the_disk_is_measured_where_the_ranks_write(tiny_model: Path, tmp_path: Path) -> None:
    class ElsewhereGroup(LocalGroup):
        def free_disk_bytes(self, folder: Path) -> int:
            assert folder.parent == tmp_path
            return 100 * PAGE_BYTES

    config = EngineConfig(tiny_model, **tiered_options((4, 6, 36), tmp_path) | {"disk_kv_bytes": None})
    group = ElsewhereGroup("cpu")
    try:
        assert set_up(group, config, ModelConfig.load(tiny_model), 256).num_disk_pages == 50
    finally:
        group.close()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each `os.write`."""
    write, sizes = os.write, []

    def counted(descriptor: int, content: bytes) -> int:
        sizes.append(len(content))
        return write(descriptor, content)

    monkeypatch.setattr(bandwidth.os, "write", counted)
    return sizes


def rate(folder: Path, nbytes: int) -> float:
    """What is measured beside a disk tier of so many bytes."""
    disk = SimpleNamespace(folder=folder, nbytes=nbytes, spec=SPEC)
    pools: Any = SimpleNamespace(disk=disk, host=SimpleNamespace(num_pages=0))
    return measure_bandwidth(pools).disk


def test_what_is_written_to_measure_a_disk_is_a_small_share_of_the_tier(tmp_path: Path, written: list[int]) -> None:
    for nbytes, expected in ((31 * READ_BYTES, 0), (64 * READ_BYTES, 2 * READ_BYTES), (2**40, PROBE_BYTES)):
        written.clear()
        assert bool(rate(tmp_path, nbytes)) == bool(expected) and sum(written) == expected <= nbytes / 32
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_measured_though_a_rank_of_the_same_pid_does_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another node, or in another container, that has the same folder: at any moment, such as this one."""
    open_file, others = os.open, []

    def opened(path: Any, *arguments: Any) -> int:
        descriptor = open_file(path, *arguments)
        if not others and Path(path).is_relative_to(tmp_path):
            others.append(0.0)
            others[0] = rate(tmp_path, 2**40)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    assert rate(tmp_path, 2**40) > 0 and others[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_compressed_is_read_and_then_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PageSpec(6, 2, 64, 16, "bfloat16", disk_codec="lossless")
    pools: Any = SimpleNamespace(disk=disk_pool(tmp_path, spec), host=SimpleNamespace(num_pages=0))
    monkeypatch.setattr(bandwidth, "disk_bandwidth", lambda folder, room: 1e6)
    monkeypatch.setattr(bandwidth, "fastest", lambda measure: 0.001 if measure() > 0 else None)
    head_bytes = spec.page_bytes // 2
    decoded = measure_bandwidth(pools).disk
    seconds = head_bytes / decoded - 6 * 0.001  # of reading what is stored
    assert 0.6 < seconds * 1e6 / head_bytes < 1
    monkeypatch.setattr(bandwidth, "disk_bandwidth", lambda folder, room: 0.0)
    assert measure_bandwidth(pools).disk == 0


def test_a_disk_that_is_full_or_becomes_so_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[int]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=PROBE_BYTES))
        assert rate(tmp_path, 2**40) == 0 and not written
    with monkeypatch.context() as patch:
        patch.setattr(bandwidth.os, "write", full)
        assert rate(tmp_path, 2**40) == 0
    monkeypatch.setattr(bandwidth.os, "write", lambda descriptor, content: 1)  # the last bytes that there were
    assert rate(tmp_path, 2**40) == 0
    assert rate(tmp_path / "missing", 2**40) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_start_needs_no_new_file_where_there_is_room_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What killed engines have left makes room for the file of one rank of several; one alone leaves none."""
    (tmp_path / ARRAY).mkdir()
    (tmp_path / "lock").touch()
    left = [tmp_path / "writer.killed.0", tmp_path / "model.json.1.partial", tmp_path / ARRAY / "c.0.0.0.0.0.1.partial"]
    touch = Path.touch

    def limited(path: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        if any(file.exists() for file in left):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        touch(path, mode, exist_ok)

    for file in left:
        file.touch()
    monkeypatch.setattr(Path, "touch", limited)
    place = CachePlace(tmp_path, "f")
    with join_folder(place, of_head(0), is_alone=True) as found:
        assert has_lock_and_writes(found) == (True, True) and not list(tmp_path.glob("writer.*"))
        with pytest.raises(ConfigError, match="in use by process"), join_folder(CachePlace(tmp_path, "f"), of_head(0)):
            pass
        assert left[1].exists(), "it is the other's"
    with (
        join_folder(place, of_head(0)) as found,
        join_folder(place, of_head(1)) as next_found,
        join_folder(place, of_head(1)) as twin,
    ):
        assert [has_lock_and_writes(one) for one in (found, next_found, twin)] == [
            (True, True), (False, True), (False, False)
        ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.rglob("*")) == [ARRAY, "lock"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for is_alone in (True, False):
        with (
            pytest.raises(ConfigError, match="cannot be used"),
            join_folder(CachePlace(tmp_path / "file"), of_head(0), is_alone),
        ):
            pass


def test_a_sweep_is_waited_for_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, is_sweeping, may_end = tmp_path / SCRATCH, threading.Event(), threading.Event()
    (folder / ARRAY).mkdir(parents=True)
    (folder / ARRAY / "c.0.0.0.0.0.0").write_bytes(bytes(2**10))  # of an engine that was killed

    def remove_arrays(_: Path) -> None:
        is_sweeping.set()
        assert may_end.wait(60)

    monkeypatch.setattr(scratch, "remove_arrays", remove_arrays)
    sweeper = threading.Thread(target=scratch.sweep_scratch, args=(tmp_path,), daemon=True)
    sweeper.start()
    assert is_sweeping.wait(60)

    clock, sleeps = count(0.0, 1000.0), count(1)

    def sleep(_: float) -> None:
        if next(sleeps) == 3:
            may_end.set()
            sweeper.join()

    monkeypatch.setattr(cache_place, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
    with join_folder(CachePlace(folder), of_head(0), is_alone=True) as found:
        assert has_lock_and_writes(found) == (True, True) and may_end.is_set()
        with pytest.raises(ConfigError, match="end that"), join_folder(CachePlace(folder), of_head(0), is_alone=True):
            pass
