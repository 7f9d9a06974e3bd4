"""`distkv cache verify` finds whatever is damaged, and with --repair leaves what an engine takes without a word."""

import os
import re
import sqlite3
from collections.abc import Callable, Container
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.damage import cut_short, flip_bit
from support.disk_process import DiskProcess
from support.disks import disk_pool
from support.pages import SPEC, random_page
from typer.testing import CliRunner

from distkv.cache_folders import verify as verify_module
from distkv.commands.main import app
from distkv.errors import ConfigError
from distkv.frontend.session import Session
from distkv.storage.disk.cache_folder import CATALOGUE, DAMAGED, DESCRIPTION, SCRATCH, FolderLock
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.disk.page_arrays import ARRAY
from distkv.storage.disk.removal import leftovers
from distkv.storage.disk.reopen import rejoin
from distkv.storage.page_spec import PageSpec

NAME = "0123456789abcdef"
SLOTS = [3, 0, 5]
METADATA = f"{ARRAY}/zarr.json"


@pytest.fixture
def spec() -> PageSpec:
    """The pages of `cache`."""
    return SPEC


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: PageSpec) -> Path:
    """Pages in three slots, and a session."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of which there are many, and no power fails here
    process = DiskProcess(tmp_path / NAME, 8, spec)
    for slot in SLOTS:
        process.write(slot, slot)
    process.close()
    with Session(tmp_path, "trip") as session:
        session.save()
    return tmp_path


def verify(cache: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", "verify", "--cache-dir", str(cache), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.strip()


def chunk(cache: Path, slot: int, head: int = 0) -> Path:
    return cache / NAME / ARRAY / f"c.{slot}.0.0.{head}.0.0"


def holds(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda cache: (cache / NAME / name).write_bytes(content)


def folder_instead(name: str) -> Callable[[Path], object]:
    def damage(cache: Path) -> None:
        (cache / NAME / name).unlink()
        (cache / NAME / name).mkdir()

    return damage


def other_index(cache: Path) -> None:
    """Rows can be read, and the index over their keys has others."""
    path = cache / NAME / CATALOGUE
    with closing(sqlite3.connect(path)) as database:
        [[number]] = database.execute("SELECT rootpage FROM sqlite_master WHERE type = 'index'").fetchall()
        [[size]] = database.execute("PRAGMA page_size").fetchall()
    content = bytearray(path.read_bytes())
    content[content.index(b"5", (number - 1) * size)] = ord("6")
    path.write_bytes(content)


def row_alone(cache: Path) -> None:
    with closing(Catalogue(cache / NAME)) as catalogue:
        [first, *_] = catalogue.entries()
        catalogue.update([], [first._replace(key=b"77", parent=b"gone", index=1, slot=6)])
    for head in range(SPEC.num_kv_heads):
        chunk(cache, 6, head).write_bytes(chunk(cache, first.slot, head).read_bytes())


def scratch(cache: Path) -> None:
    (cache / SCRATCH).mkdir()
    disk_pool(cache / SCRATCH).store(1, random_page(SPEC, 1))


ALL = set(SLOTS)
DAMAGES: dict[str, tuple[Callable[[Path], object], set[int], str]] = {
    "catalogue": (holds(CATALOGUE, b"garbage" * 999), set(), "nobody knows the pages that it listed"),
    "index of the catalogue": (other_index, set(), "is damaged .*nobody knows the pages"),
    "catalogue a folder": (folder_instead(CATALOGUE), set(), "is a folder and no catalogue"),
    "description": (holds(DESCRIPTION, b"{}"), ALL, "does not describe KV pages"),
    "description a folder": (folder_instead(DESCRIPTION), ALL, "does not describe KV pages"),
    "metadata": (holds(METADATA, b"{}"), ALL, "metadata of"),
    "metadata lost": (lambda cache: (cache / NAME / METADATA).unlink(), ALL, "has no zarr.json"),
    "metadata a folder": (folder_instead(METADATA), ALL, "metadata of"),
    "both": (lambda cache: [holds(name, b"")(cache) for name in (DESCRIPTION, METADATA)], ALL, "metadata of"),
    "torn": (lambda cache: cut_short(chunk(cache, 3)), {0, 5}, r"c\.3\.0\.0\.0\.0\.0 has not the 1536 bytes"),
    "empty": (lambda cache: chunk(cache, 3, 1).write_bytes(b""), {0, 5}, r"c\.3\.0\.0\.1\.0\.0 has not the"),
    "flipped bit": (lambda cache: flip_bit(chunk(cache, 0)), {3, 5}, "the checksum of layer 1 is wrong"),
    "missing": (lambda cache: chunk(cache, 0, 1).unlink(), {3, 5}, "cannot be read: No such file"),
    "of no page": (lambda cache: chunk(cache, 7).write_bytes(b"x"), ALL, r"1 files in .* such as c\.7\.0\.0\.0"),
    "partial": (holds(f"{ARRAY}/c.1.0.0.0.0.0.77.partial", b"x"), ALL, r"such as c\.1\.0\.0\.0\.0\.0\.77\.partial"),
    "set aside": (holds(f"{CATALOGUE}{DAMAGED}", b"x"), ALL, f"such as {CATALOGUE}{DAMAGED}"),
    "row alone": (row_alone, ALL, "1 pages in .* follow one that is not there"),
    "scratch": (scratch, ALL, "scratch holds pages of an engine that was killed"),
    "session": (lambda cache: cut_short(cache / "sessions/trip.json"), ALL, r"trip\.json' is damaged"),
    "session cut off": (
        lambda cache: (cache / "sessions/trip.json.partial").touch(),
        ALL,
        "what a kill left of a write",
    ),
}


COMPRESSED = {
    **{name: DAMAGES[name] for name in ("description", "both", "metadata lost", "row alone")},
    "torn": (lambda cache: cut_short(chunk(cache, 3)), {0, 5}, r"c\.3\.0\.0\.0\.0\.0 has not the \d+ bytes that its"),
    "empty": (lambda cache: chunk(cache, 3, 1).write_bytes(b""), {0, 5}, r"c\.3\.0\.0\.1\.0\.0 has not the"),
    "flipped bit": (lambda cache: flip_bit(chunk(cache, 0)), {3, 5}, "the checksum of layer 0 is wrong"),
    "of another page": (
        lambda cache: chunk(cache, 0).write_bytes(chunk(cache, 5).read_bytes()),
        {3, 5},
        "the checksum of layer 0 is wrong",
    ),
    "unknown, with a flipped bit": (
        lambda cache: [damage(cache) for damage in (DAMAGES["both"][0], lambda cache: flip_bit(chunk(cache, 0)))],
        {3, 5},
        "the checksum of layer 0 is wrong",
    ),
}
"""The same of pages that are compressed, where it differs."""


@pytest.mark.parametrize("damage, left, said", DAMAGES.values(), ids=DAMAGES)
def test_repairs(
    cache: Path, damage: Callable[[Path], object], left: set[int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_repair(cache, SPEC, damage, left, said)
    assert caplog.messages == [], "nothing is left to be said"


@pytest.mark.parametrize("spec", [replace(SPEC, disk_codec="lossless")], ids=["lossless"])
@pytest.mark.parametrize("damage, left, said", COMPRESSED.values(), ids=COMPRESSED)
def test_repairs_of_compressed_pages(
    cache: Path, spec: PageSpec, damage: Callable[[Path], object], left: set[int], said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    check_repair(cache, spec, damage, left, said)
    assert caplog.messages == []


def check_repair(cache: Path, spec: PageSpec, damage: Callable[[Path], object], left: set[int], said: str) -> None:
    """Verifies what is whole, then what is damaged, twice, and takes it over as an engine does."""
    assert verify(cache) == (0, "3 pages read, all whole")
    damage(cache)
    before = sorted(cache.rglob("*"))
    code, text = verify(cache)
    assert code == 1 and re.search(said, text) and "all whole" not in text
    assert sorted(cache.rglob("*")) == before, "a look changes nothing"
    lock = FolderLock(cache / NAME)
    with pytest.raises(ConfigError, match="in use by process"):
        verify(cache, "--repair")
    lock.release()
    code, text = verify(cache, "--repair")
    assert code == 1 and re.search(said, text)
    assert verify(cache) == (0, f"{len(left)} pages read, all whole")
    process = DiskProcess(cache / NAME, 8, spec)
    assert process.read() == left
    process.close()
    with Session(cache, "trip") as session:
        session.save()


def test_what_an_engine_is_writing_is_not_damaged(cache: Path) -> None:
    lock = FolderLock(cache / NAME)
    chunk(cache, 7).write_bytes(b"x")
    with Session(cache, "trip"):
        (cache / "sessions" / "trip.json.partial").touch()
        assert verify(cache) == (0, "3 pages read, all whole")
    lock.release()
    assert verify(cache)[0] == 1


def test_what_an_engine_writes_that_has_started_meanwhile_is_not_damaged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = []

    def start_and_find(folder: Path, listed: Container[int]) -> list[Path]:
        locks.append(FolderLock(cache / NAME))
        chunk(cache, 7).write_bytes(b"x")
        return leftovers(folder, listed)

    monkeypatch.setattr(verify_module, "leftovers", start_and_find)
    code, text = verify(cache)
    for lock in locks:
        lock.release()
    assert (code, text, len(locks)) == (0, "3 pages read, all whole", 1)
    monkeypatch.undo()
    assert verify(cache)[0] == 1


def test_a_session_that_cannot_be_locked_is_read_all_the_same(cache: Path) -> None:
    """It is open, or nobody may write there; then it is not repaired either."""
    with Session(cache, "trip"):
        cut_short(cache / "sessions/trip.json")
        for options in ([], ["--repair"]):
            code, text = verify(cache, *options)
            assert code == 1 and "trip.json' is damaged" in text
        assert (cache / "sessions/trip.json").exists()


def test_pages_that_another_node_lists_stay(cache: Path) -> None:
    """They lie on the disk of a node that a rank alone is on, here one that led an engine before."""
    rejoin(cache / NAME, SPEC, 8)
    (cache / NAME / f"{CATALOGUE}{DAMAGED}").unlink()
    before = sorted(cache.rglob("c.*"))
    assert len(before) == len(SLOTS) * SPEC.num_kv_heads
    code, text = verify(cache, "--repair")
    assert code == 0 and "stays as it is: its pages are listed on another node" in text
    result = CliRunner().invoke(app, ["cache", "prune", "--cache-dir", str(cache), "--max-bytes", "1"])
    assert result.exit_code == 0 and "stays as it is" in result.output
    assert sorted(cache.rglob("c.*")) == before
