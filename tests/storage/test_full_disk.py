"""On a disk without any room what lies there is read, and what frees room works."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.disks import NUM_PAGES, description, file_size_limit, kept_pages, listed
from typer.testing import CliRunner

from distkv.commands.main import app
from distkv.engine.catalogue_writer import CatalogueWriter
from distkv.storage.device import CpuDevice
from distkv.storage.disk import disk_array
from distkv.storage.disk.cache_folder import CATALOGUE
from distkv.storage.disk.catalogue import Catalogue, read_catalogue
from distkv.storage.disk.disk_array import find_slots
from distkv.storage.disk.page_arrays import ARRAY, DiskShare
from distkv.storage.disk.removal import num_bytes
from distkv.storage.disk.reopen import reopen
from distkv.storage.errors import StoreError
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.page_spec import PageSpec
from distkv.workers.cache_place import CachePlace
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.sizes import PoolSizes

NAME = "0123456789abcdef"
SPEC = PageSpec(num_layers=4, num_kv_heads=2, page_size=128, head_dim=16, dtype="float32")  # 128 KiB a page
Fill = Callable[[Path], AbstractContextManager[None]]


@contextmanager
def filled(cache: Path) -> Iterator[None]:
    """Another program has taken all that was free."""
    with open(cache / "other", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    yield
    (cache / "other").unlink()


@contextmanager
def unwritable(_: Path) -> Iterator[None]:
    """No file can grow. It is another error than that of a full disk, in the same places, and needs no rights."""
    with file_size_limit(0):
        yield


@contextmanager
def crowded(cache: Path) -> Iterator[None]:
    """Nothing but pages can be written, unless some of those that lie there now have gone."""
    most = num_bytes(cache / NAME)

    def limit(owner: Any, name: str, error: Exception) -> None:
        real = getattr(owner, name)

        def write(*arguments: Any, **options: Any) -> None:
            if num_bytes(cache / NAME) >= most:
                raise error
            real(*arguments, **options)

        patch.setattr(owner, name, write)

    with pytest.MonkeyPatch.context() as patch:
        limit(Catalogue, "update", StoreError("the catalogue cannot be written: database or disk is full"))
        limit(disk_array, "replace_file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        yield


@pytest.fixture
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Fill]]:
    """A cache_dir, and what takes its room."""
    if request.param is not filled:
        yield tmp_path, request.param
        return
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount; the other case does not")
    yield tmp_path, filled
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def leave_as_killed(folder: Path) -> None:
    """Has the catalogue be as if its process had been killed: the table and all its rows are in the log."""
    entries, _ = read_catalogue(folder)
    (folder / CATALOGUE).unlink()
    with closing(Catalogue(folder)) as catalogue:
        catalogue.update([], entries)
        files = {path: path.read_bytes() for path in (folder / CATALOGUE, folder / f"{CATALOGUE}-wal")}
    for path, content in files.items():
        path.write_bytes(content)


@pytest.mark.parametrize("full", [filled, unwritable], indirect=True)
@pytest.mark.parametrize("killed", [False, True])
def test_what_lies_there_is_read(full: tuple[Path, Fill], killed: bool) -> None:
    cache, fill = full
    kept_pages(cache / NAME, [3, 0, 5], SPEC)
    if killed:
        leave_as_killed(cache / NAME)
    with fill(cache):
        tier = DiskTier(CachePlace(cache / NAME), DiskShare.of_all(SPEC), 0, description(SPEC))
        pools = KVPools(SPEC, PoolSizes(host=1, disk=NUM_PAGES), CpuDevice(), tier)

        def run(plan: StepPlan) -> Report:
            assert plan.adopt is not None
            pools.adopt(plan.adopt)
            return pools.take_report()

        books = TieredCache((1, 1, NUM_PAGES), 1)
        writer = CatalogueWriter(cache / NAME, books)
        writer.adopt(run)
        found = CliRunner().invoke(app, ["cache", "ls", "--cache-dir", str(cache)])
        writer.close()
        pools.close()
    assert books.num_idle == 3
    assert found.exit_code == 0 and "│ 3 " in found.output
    with closing(Catalogue(cache / NAME)) as catalogue:
        catalogue.update([0], [])
    assert listed(cache / NAME) == {3, 5}, "nothing is left that stands in the way"


@pytest.mark.parametrize("full", [filled, crowded], indirect=True)
def test_pages_are_given_up(full: tuple[Path, Fill]) -> None:
    cache, fill = full
    folder = cache / NAME
    kept_pages(folder, [3, 0, 5], SPEC)
    leave_as_killed(folder)
    with fill(cache):
        most = ["--max-bytes", str(SPEC.page_bytes)]
        pruned = CliRunner().invoke(app, ["cache", "prune", *most, "--cache-dir", str(cache)])
        assert pruned.exit_code == 0 and "2 pages given up" in pruned.output
        assert not list((folder / ARRAY).glob("c.[03].*")) and listed(folder) == {5}


@pytest.mark.parametrize("full", [filled, crowded], indirect=True)
@pytest.mark.parametrize("slots", [[3, 0, 5], []])
def test_fewer_slots(full: tuple[Path, Fill], slots: list[int]) -> None:
    """Pages that have no room among them go, or files that no row speaks of."""
    cache, fill = full
    folder = cache / NAME
    kept_pages(folder, slots, SPEC)
    for number in range(5 - len(slots)):
        (folder / ARRAY / f"c.{number}.0.0.1.0.0").write_bytes(bytes(65536))
    with fill(cache):
        reopen(folder, SPEC, 2, description(SPEC))
        assert find_slots(folder, SPEC) == 2 and listed(folder) == ({0, 1} if slots else set())


@pytest.mark.parametrize("full", [filled, crowded], indirect=True)
def test_more_slots_are_refused_with_the_cure(full: tuple[Path, Fill]) -> None:
    cache, fill = full
    kept_pages(cache / NAME, [3, 0, 5], SPEC)
    with fill(cache), pytest.raises(StoreError, match=r"cannot be resized \(No space left on device\); make room"):
        reopen(cache / NAME, SPEC, 100, description(SPEC))
    assert listed(cache / NAME) == {3, 0, 5}
    reopen(cache / NAME, SPEC, 100, description(SPEC))
