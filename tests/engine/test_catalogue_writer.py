"""The catalogue follows the disk tier, and what keeps it from being written for a while costs no page."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.disks import kept_pages, listed
from support.memory import Memory, engine_info

from distkv.engine import catalogue_writer
from distkv.engine.catalogue_writer import CatalogueWriter
from distkv.engine.engine import Engine
from distkv.storage.disk import cache_folder, mounts
from distkv.storage.disk.cache_folder import CATALOGUE, DAMAGED
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.ledger.disk_journal import DiskChanges
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long the writer waits for a lock, as it says when it opens the catalogue and later; a failure is tried
    again at once."""
    waits = []

    class Recorded(Catalogue):
        def __init__(self, folder: Path, wait: float):
            waits.append(wait)
            super().__init__(folder, wait=wait and 0.01)

        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            super().wait(seconds and 0.01)

    monkeypatch.setattr(catalogue_writer, "Catalogue", Recorded)
    monkeypatch.setattr(catalogue_writer, "RETRY_SECONDS", 0.0)
    return waits


@pytest.fixture
def writer(tmp_path: Path, waits: list[float]) -> Iterator[CatalogueWriter]:
    writer = CatalogueWriter(tmp_path, TieredCache((2, 2, 8), 1))
    yield writer
    writer.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another program writes to the catalogue."""
    with closing(sqlite3.connect(folder / CATALOGUE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def write(writer: CatalogueWriter, slot: int, name: str) -> None:
    """A page of that name is written to a slot."""
    page = Page(0, key=PageKey(name.encode(), b"root", b"tokens"))
    writer.update(DiskChanges(written={slot: (slot, page)}), {slot: name.encode()})


def pages(folder: Path) -> dict[int, str]:
    """What the catalogue lists."""
    with closing(Catalogue(folder, read_only=True)) as catalogue:
        return {entry.slot: entry.key.decode() for entry in catalogue.entries()}


def last_use(folder: Path, slot: int) -> float:
    with closing(Catalogue(folder, read_only=True)) as catalogue:
        return next(entry.last_use for entry in catalogue.entries() if entry.slot == slot)


def test_a_lock_is_not_waited_for_and_nothing_is_lost(
    tmp_path: Path, writer: CatalogueWriter, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    write(writer, 0, "a")
    write(writer, 1, "b")
    write(writer, 6, "old")
    before = last_use(tmp_path, 6)
    with locked(tmp_path):
        writer.update(DiskChanges(vacated={0}, touched={6}), {})
        write(writer, 7, "gone again")
        writer.update(DiskChanges(vacated={7}), {})
        write(writer, 0, "c")
        writer.update(DiskChanges(vacated={0, 1}), {})
        write(writer, 0, "d")
        write(writer, 2, "e")
        assert pages(tmp_path) == {0: "a", 1: "b", 6: "old"}
    assert waits and set(waits) == {0.0}
    assert len(caplog.messages) == 1 and "database is locked; it is tried again" in caplog.text
    writer.update(DiskChanges(), {})
    assert pages(tmp_path) == {0: "d", 2: "e", 6: "old"} and last_use(tmp_path, 6) > before
    with locked(tmp_path):
        write(writer, 3, "f")
    assert len(caplog.messages) == 2, "another time"
    writer.close()
    assert pages(tmp_path) == {0: "d", 2: "e", 3: "f", 6: "old"} and waits[-1] > 0.0


def test_a_catalogue_that_refuses_is_left_alone_for_a_while(
    tmp_path: Path, writer: CatalogueWriter, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(writer, 0, "a")
    monkeypatch.setattr(catalogue_writer, "RETRY_SECONDS", 1000.0)
    with locked(tmp_path):
        write(writer, 1, "b")
    for slot in range(2, 6):
        write(writer, slot, "cdef"[slot - 2])
    assert pages(tmp_path) == {0: "a"}
    writer.close()
    assert pages(tmp_path) == dict(enumerate("abcdef"))


def test_an_engine_with_nothing_to_do_tries_again(tmp_path: Path, waits: list[float]) -> None:
    """Else what it has written would be lost if its process ended before the next request."""
    info = engine_info(
        cache_dir=str(tmp_path), enable_prefix_caching=True, num_host_pages=2, num_disk_pages=8, num_pages=8
    )
    engine = Engine(info, RankExecutor(Memory(info).execute))
    writer: Any = engine._runner._catalogue_writer
    write(writer, 0, "a")
    assert engine.rest() is None
    with locked(tmp_path):
        write(writer, 1, "b")
        assert not engine.has_work or not engine.step()
        assert engine.rest() is not None
    assert pages(tmp_path) == {0: "a"} and not engine.has_work
    assert engine.rest() is None
    assert pages(tmp_path) == {0: "a", 1: "b"}
    engine.close()


def test_an_end_that_cannot_wait_longer_says_what_is_lost(
    tmp_path: Path, writer: CatalogueWriter, caplog: pytest.LogCaptureFixture
) -> None:
    write(writer, 0, "a")
    with locked(tmp_path):
        write(writer, 1, "b")
        writer.close()
    assert "database is locked; later processes will not find 1 of the pages on disk" in caplog.text


@pytest.mark.parametrize("closes", [False, True])
def test_a_catalogue_that_is_damaged_while_it_is_used(
    tmp_path: Path, writer: CatalogueWriter, caplog: pytest.LogCaptureFixture, closes: bool
) -> None:
    """It is made again at once, at the end too, with all that is still known of the pages."""
    kept_pages(tmp_path, [3, 5])
    writer.adopt(lambda plan: Report())
    if closes:
        with locked(tmp_path):
            write(writer, 1, "b")
        caplog.clear()
    (tmp_path / CATALOGUE).write_bytes(b"somebody else's" * 1000)
    if closes:
        writer.close()
    else:
        write(writer, 1, "b")
    assert pages(tmp_path) == {1: "b"}
    assert (tmp_path / f"{CATALOGUE}{DAMAGED}").exists()
    set_aside, lost = caplog.messages
    assert DAMAGED in set_aside and "will not find 2 of the pages on disk" in lost


def test_a_damaged_catalogue_that_cannot_be_removed_at_once_ends_no_engine(
    tmp_path: Path, writer: CatalogueWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    kept_pages(tmp_path, [3, 5])
    writer.adopt(lambda plan: Report())
    (tmp_path / CATALOGUE).write_bytes(b"somebody else's" * 1000)
    (tmp_path / f"{CATALOGUE}-journal").touch()
    with monkeypatch.context() as patch:
        patch.setattr(cache_folder, "sync_folder", fail)
        write(writer, 1, "b")
    assert "cannot be removed: Input/output error; it is tried again" in caplog.text
    write(writer, 2, "c")
    assert pages(tmp_path) == {1: "b", 2: "c"}


def test_an_engine_that_was_taken_over_changes_nothing(
    tmp_path: Path, writer: CatalogueWriter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still, and another one took it for dead, on a file system of several nodes."""
    monkeypatch.setattr(mounts, "file_system", lambda folder: "lustre")
    kept_pages(tmp_path, [3, 0, 5])
    writer.adopt(lambda plan: Report())
    other = CatalogueWriter(tmp_path, TieredCache((2, 2, 8), 1))
    other.adopt(lambda plan: Report())
    writer.update(DiskChanges(vacated={3, 0, 5}), {})
    write(writer, 1, "b")
    writer.add([Entry(6, b"6" * 32, b"", b"", b"", 0.0, 0)])
    assert writer.pause is None, "nothing of it waits to be written"
    writer.close()
    assert listed(tmp_path) == {3, 0, 5}
    assert "another engine has taken the catalogue" in caplog.text and len(caplog.messages) == 1
    write(other, 1, "c")
    other.close()
    assert pages(tmp_path)[1] == "c"


def test_pages_are_taken_over_though_the_catalogue_is_locked(tmp_path: Path, writer: CatalogueWriter) -> None:
    """One whose file is missing is not, and its row goes later."""
    kept_pages(tmp_path, [3, 0, 5])
    with locked(tmp_path):
        writer.adopt(lambda plan: Report(missing=[0]))
        assert listed(tmp_path) == {3, 0, 5}
    assert writer._cache.num_idle == 2
    writer.update(DiskChanges(), {})
    assert listed(tmp_path) == {3, 5}


def test_pages_in_slots_that_are_no_more_are_not_asked_for(tmp_path: Path, waits: list[float]) -> None:
    """The tier has fewer slots than before, and another program has kept the catalogue locked, so that it still lists
    pages that were given up for that. Ranks would refuse a plan that names their slots."""
    kept_pages(tmp_path, [3, 6, 0, 7])
    writer = CatalogueWriter(tmp_path, TieredCache((2, 2, 4), 1))
    asked: list[set[int]] = []

    def run(plan: StepPlan) -> Report:
        asked.append(set(plan.adopt or ()))
        return Report()

    with locked(tmp_path):
        writer.adopt(run)
    assert asked == [{3, 0}] and writer._cache.num_idle == 2
    writer.close()
    assert listed(tmp_path) == {3, 0}


def test_a_clock_that_is_set_back_does_not_make_pages_older(
    tmp_path: Path, writer: CatalogueWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while an engine runs nor between two: what was used last is given up last."""
    monkeypatch.setattr("time.time", lambda: 2e9)
    write(writer, 0, "a")
    writer.close()
    monkeypatch.setattr("time.time", lambda: 1e9)
    later = CatalogueWriter(tmp_path, TieredCache((2, 2, 8), 1))
    later.adopt(lambda plan: Report())
    write(later, 1, "b")
    later.update(DiskChanges(touched={0}), {})
    monkeypatch.setattr("time.time", lambda: 2e9 + 1)
    write(later, 2, "c")
    later.close()
    first, second, third = (last_use(tmp_path, slot) for slot in (0, 1, 2))
    assert 2e9 < second < first < third == 2e9 + 1
