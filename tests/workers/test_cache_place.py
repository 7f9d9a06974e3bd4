"""What is asked of the disk before pages lie there: how much is free where the ranks write, and how fast it is."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.llms import PAGE_BYTES, tiered_options

from distkv.config import EngineConfig
from distkv.launch.launch import set_up
from distkv.storage.disk.cache_folder import ARRAY
from distkv.workers import bandwidth
from distkv.workers.bandwidth import PROBE_BYTES, READ_BYTES, measure_bandwidth
from distkv.workers.cache_place import free_bytes
from distkv.workers.group.local_group import LocalGroup
from distkv.workers.model.model_config import ModelConfig


def test_free_bytes_while_others_remove_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scan = tmp_path / "cache", os.scandir
    (folder / ARRAY).mkdir(parents=True)
    for slot in range(8):
        (folder / ARRAY / f"c.{slot}.0.0.0.0.0").write_bytes(bytes(2**20))
    free = shutil.disk_usage(tmp_path).free

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
    assert free_bytes(folder) - free >= 4 * 2**20 - 2**20
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert free_bytes(folder) > 0, "the folder is not there yet, or no more"


def test_the_disk_is_measured_where_the_ranks_write(tiny_model: Path, tmp_path: Path) -> None:
    class ElsewhereGroup(LocalGroup):
        def free_disk_bytes(self, folder: Path) -> int:
            assert folder.parent == tmp_path
            return 100 * PAGE_BYTES

    config = EngineConfig(tiny_model, **tiered_options((4, 6, 36), tmp_path) | {"disk_kv_bytes": None})
    group = ElsewhereGroup("cpu")
    try:
        assert set_up(group, config, ModelConfig.load(tiny_model), 256).num_disk_pages == 50 - 4
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
    pools: Any = SimpleNamespace(disk=SimpleNamespace(folder=folder, nbytes=nbytes), host=SimpleNamespace(num_pages=0))
    return measure_bandwidth(pools).disk


def test_what_is_written_to_measure_a_disk_is_a_small_share_of_the_tier(tmp_path: Path, written: list[int]) -> None:
    for nbytes, expected in ((31 * READ_BYTES, 0), (64 * READ_BYTES, 2 * READ_BYTES), (2**40, PROBE_BYTES)):
        written.clear()
        assert bool(rate(tmp_path, nbytes)) == bool(expected) and sum(written) == expected <= nbytes / 32
    assert list(tmp_path.iterdir()) == []


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
