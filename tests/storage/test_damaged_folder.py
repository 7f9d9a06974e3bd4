"""All of a cache folder can be made again, so what is damaged in it stops no engine: it is set aside, and said."""

import errno
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.disks import NUM_PAGES, description, kept_pages, listed
from support.pages import SPEC, load, random_page, same

from distkv.storage.disk import catalogue
from distkv.storage.disk.cache_folder import CATALOGUE, DAMAGED, DESCRIPTION, LOCK, DamagedError, FolderLock
from distkv.storage.disk.catalogue import Catalogue, read_catalogue
from distkv.storage.disk.disk_array import METADATA, find_slots, remove_arrays
from distkv.storage.disk.page_arrays import ARRAY, DiskShare
from distkv.storage.disk.removal import give_up, sweep
from distkv.storage.disk.reopen import reopen
from distkv.storage.errors import ConfigError, StoreError
from distkv.storage.pools.disk_pool import DiskPool

SLOTS = [3, 0, 5]


def reopened(folder: Path, num_pages: int = NUM_PAGES) -> set[int]:
    """Opens a folder as an engine does; returns the slots of the pages in it, each of which is what it was."""
    reopen(folder, SPEC, num_pages, description())
    entries, _ = read_catalogue(folder)
    pool = DiskPool(SPEC, folder, num_pages, DiskShare.of_all(SPEC))
    missing = pool.adopt({one.slot: one.crc32c for one in entries})
    found = {one.slot for one in entries} - set(missing)
    for slot in found:
        assert same(load(pool, slot), random_page(SPEC, slot))
    pool.store(7, random_page(SPEC, 7))
    assert find_slots(folder, SPEC) == num_pages
    return found


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(9000),
    "letters": b"no such thing as this was ever written here" * 300,
    "no text": bytes(range(128, 256)) * 40,
    "a number": b"70",
    "a list": b"[]",
    "null": b"null",
    "an object": b"{}",
    "deep": b"[" * 20_000,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("name, kept", [(CATALOGUE, False), (DESCRIPTION, True), (f"{ARRAY}/{METADATA}", True)])
def test_garbage(tmp_path: Path, name: str, kept: bool, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Pages stay where they are still known, since what they hold is checked when it is read."""
    kept_pages(tmp_path, SLOTS)
    (tmp_path / name).write_bytes(content)
    assert reopened(tmp_path) == (set(SLOTS) if kept else set())
    is_empty = name == CATALOGUE and not content  # as good as a new one
    assert len(caplog.messages) == (not is_empty)
    if not is_empty:
        assert f"it is renamed to {Path(name).name}{DAMAGED} and made again" in caplog.text
        assert (tmp_path / f"{name}{DAMAGED}").read_bytes() == content
    caplog.clear()
    assert reopened(tmp_path) == (set(SLOTS) if kept else set())
    assert caplog.messages == []


def wrong_type(column: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / CATALOGUE)) as database, database:
            database.execute(f'UPDATE pages SET "{column}" = ? WHERE slot = 0', (value,))

    return damage


def other_fields(name: str, **fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def folder_instead(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


@pytest.mark.parametrize(
    "damage, kept",
    [
        *((wrong_type(column, value), False) for column in ("key", "parent", "tokens", "crc32c", "last_use", "index")
          for value in (*(["x", "ÿ"] if column != "last_use" else ["x", b"x", -1.0, float("inf")]),)),
        (wrong_type("index", -1), False), (wrong_type("index", 1.5), False), (wrong_type("key", 7), False),
        (wrong_type("slot", -3), False),
        (other_fields(DESCRIPTION, page_bytes="many"), True), (other_fields(DESCRIPTION, num_kv_heads=0), True),
        (other_fields(DESCRIPTION, fingerprint=None), True), (other_fields(DESCRIPTION, fingerprint="0123" * 16), True),
        (other_fields(f"{ARRAY}/{METADATA}", shape="x"), True), (other_fields(f"{ARRAY}/{METADATA}", shape=[]), True),
        (other_fields(f"{ARRAY}/{METADATA}", fill_value=1), True),
        (other_fields(f"{ARRAY}/{METADATA}", data_type="int16"), True),
        (folder_instead(CATALOGUE), False), (folder_instead(DESCRIPTION), True),
        (folder_instead(f"{ARRAY}/{METADATA}"), True),
    ],
)  # fmt: skip
def test_wrong_types(
    tmp_path: Path, damage: Callable[[Path], None], kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kept_pages(tmp_path, SLOTS)
    damage(tmp_path)
    assert reopened(tmp_path) == (set(SLOTS) if kept else set())
    assert len(caplog.messages) == 1 and DAMAGED in caplog.text


def test_files_that_are_cut_short_or_changed_anywhere(tmp_path: Path) -> None:
    """Whatever became of the bytes, the folder opens, and each page that is found is the one that was written."""
    rng = random.Random(0)
    original = tmp_path / "original"
    kept_pages(original, SLOTS)
    names = [CATALOGUE, DESCRIPTION, f"{ARRAY}/{METADATA}"]
    for number in range(30):
        folder, name = tmp_path / str(number), names[number % 3]
        shutil.copytree(original, folder)
        content = bytearray((folder / name).read_bytes())
        if number % 2:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.choice([1, 3, 50])):
                content[rng.randrange(len(content))] = rng.randrange(256)
        (folder / name).write_bytes(content)
        try:
            reopened(folder)
        except ConfigError as error:  # what is left may be the sign of another program
            assert "was not made by distkv" in str(error)
        except StoreError as error:  # of a page whose checksum was changed
            assert name == CATALOGUE and "is damaged: the checksum of layer" in str(error)


def test_a_catalogue_whose_damage_shows_when_it_is_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The index of keys is not looked at before."""
    kept_pages(tmp_path, SLOTS)
    with closing(sqlite3.connect(tmp_path / CATALOGUE)) as database:
        [[page]] = database.execute("SELECT rootpage FROM sqlite_master WHERE type = 'index'")
        [[size]] = database.execute("PRAGMA page_size")
    content = bytearray((tmp_path / CATALOGUE).read_bytes())
    content[(page - 1) * size : page * size] = b"x" * size
    (tmp_path / CATALOGUE).write_bytes(content)
    reopen(tmp_path, SPEC, 2, description())
    assert read_catalogue(tmp_path) == ([], set())
    assert any(DAMAGED in message for message in caplog.messages)


def test_a_message_of_sqlite_that_is_no_text(tmp_path: Path) -> None:
    """It quotes the file."""
    kept_pages(tmp_path, SLOTS)
    content = (tmp_path / CATALOGUE).read_bytes()
    (tmp_path / CATALOGUE).write_bytes(content.replace(b"CREATE TABLE", b"CR\xff\xfe\xfd\xfc TABLE"))
    assert reopened(tmp_path) == set()


def test_a_lock_that_holds_garbage(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(bytes(range(256)))
    lock = FolderLock(tmp_path)
    (tmp_path / LOCK).write_bytes(bytes(range(128, 256)))
    with pytest.raises(ConfigError, match="is in use by"):
        FolderLock(tmp_path)
    lock.release()


def test_a_page_whose_row_is_older_than_it(tmp_path: Path) -> None:
    """A slot that was written again while its row could not be removed: the row is taken over, and what lies there is
    not taken for its page."""
    kept_pages(tmp_path, SLOTS)
    pool = DiskPool(SPEC, tmp_path, NUM_PAGES, DiskShare.of_all(SPEC))
    pool.store(3, random_page(SPEC, 99))
    reopen(tmp_path, SPEC, NUM_PAGES, description())
    entries, slots = read_catalogue(tmp_path)
    assert slots == set(SLOTS)
    assert pool.adopt({one.slot: one.crc32c for one in entries}) == []
    assert same(load(pool, 0), random_page(SPEC, 0))
    with pytest.raises(StoreError, match="is damaged: the checksum of layer 0 is wrong"):
        load(pool, 3)


def test_a_catalogue_that_is_locked_is_not_damaged(tmp_path: Path) -> None:
    kept_pages(tmp_path, SLOTS)
    with closing(sqlite3.connect(tmp_path / CATALOGUE, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="cannot be opened: database is locked") as error:
            Catalogue(tmp_path, wait=0.0)
        assert not isinstance(error.value, DamagedError)
        assert listed(tmp_path) == set(SLOTS), "a look needs no lock"
    assert reopened(tmp_path) == set(SLOTS)


def test_a_catalogue_that_is_locked_after_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no damage then either, and nothing stays open."""
    path = tmp_path / CATALOGUE
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE pages (slot)")
        database = sqlite3.connect(path, timeout=0.0)
        monkeypatch.setattr(catalogue, "open_to_write", lambda *_: database)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="cannot be read: database is locked") as error:
            Catalogue(tmp_path)
    assert not isinstance(error.value, DamagedError)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")


@pytest.mark.parametrize(
    "remove", [remove_arrays, sweep, lambda folder: give_up(folder, {3, 0}), lambda folder: reopened(folder, 1)]
)
def test_files_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Path], object]
) -> None:
    kept_pages(tmp_path, SLOTS)
    (tmp_path / ARRAY / "c.7.0.0.0.0.0").touch()  # of no page that is listed
    unlink = os.unlink

    def fail(path: Any, **more: Any) -> None:
        if Path(path).name.startswith("c."):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(StoreError, match="cannot be removed: Input/output error"):
        remove(tmp_path)
