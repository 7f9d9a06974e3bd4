"""`distkv cache` on folders that are not as an engine leaves them: damaged, full, or left by a kill."""

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.disks import description, disk_pool, kept_pages, listed
from support.pages import SPEC, random_page
from typer.testing import CliRunner

from distkv import LLM, SamplingParams
from distkv.commands.main import app
from distkv.storage.device import CpuDevice
from distkv.storage.disk import scratch as scratch_module
from distkv.storage.disk.cache_folder import CATALOGUE, DAMAGED, DESCRIPTION, SCRATCH, FolderLock
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.disk.page_arrays import ARRAY, DiskShare, chunk_name
from distkv.storage.errors import ConfigError, StoreError
from distkv.workers.cache_place import CachePlace
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.sizes import PoolSizes

NAME = "0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    kept_pages(tmp_path / NAME, [3, 0, 5])
    return tmp_path


def distkv(cache: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *arguments, "--cache-dir", str(cache)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def chunks(folder: Path) -> set[int]:
    """The slots of which files lie there."""
    return {int(path.name.split(".")[1]) for path in (folder / ARRAY).glob("c.*")}


@pytest.fixture
def scratch(cache: Path) -> Path:
    """What an engine without prefix caching left when it was killed."""
    folder = cache / SCRATCH
    folder.mkdir()
    disk_pool(folder).store(1, random_page(SPEC, 1))
    return folder


def test_a_scratch_folder_that_a_kill_left(cache: Path, scratch: Path) -> None:
    lock = FolderLock(scratch)
    code, text = distkv(cache, "ls")
    assert code == 0 and "no prefix caching, an engine that runs" in text
    assert "scratch" not in distkv(cache, "prune", "--max-bytes", "0")[1] and chunks(scratch) == {1}
    lock.release()
    assert "no prefix caching, an engine that was killed" in distkv(cache, "ls")[1]
    distkv(cache, "prune", "--max-bytes", "0", "--model", NAME[:3])
    assert chunks(scratch) == {1}
    code, text = distkv(cache, "prune", "--max-bytes", "1GiB")
    assert code == 0 and "scratch: 3.00 KiB freed, left by an engine that was killed" in text
    assert not (scratch / ARRAY).exists() and SCRATCH not in distkv(cache, "ls")[1]


def test_pages_of_codes_are_listed_as_such_and_checked(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"page_size": 16, "device_kv_bytes": "64KiB", "host_kv_bytes": "64KiB"}
    options |= {"max_num_batched_tokens": 64, "disk_kv_bytes": "1MiB"}
    with LLM(tiny_model, cache_dir=tmp_path, kv_cache_dtype="int8", **options) as llm:
        llm.generate([list(range(5, 70))], SamplingParams(max_tokens=2), use_tqdm=False)
    code, text = distkv(tmp_path, "ls")
    assert code == 0 and re.search(r"│ int8 +│ 4 ", text), text
    assert distkv(tmp_path, "verify")[0] == 0
    file = next(tmp_path.rglob("c.0.*"))
    damaged = bytearray(file.read_bytes())
    assert len(damaged) == 2 * 2 * 16 * (16 + 4), "two layers, K and V of 16 tokens: codes, and scales of float32"
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    code, text = distkv(tmp_path, "verify")
    assert code == 1 and "the checksum of layer 1 is wrong" in text


def test_a_scratch_folder_alone(tmp_path: Path) -> None:
    (tmp_path / SCRATCH).mkdir()
    assert "holds no KV pages" in distkv(tmp_path, "ls")[1]
    disk_pool(tmp_path / SCRATCH).store(1, random_page(SPEC, 1))
    assert "3.00 KiB in all" in distkv(tmp_path, "ls")[1]


def test_an_engine_with_prefix_caching_sweeps_the_scratch_folder(cache: Path, scratch: Path) -> None:
    """Not while another one uses it, and not when something else lies there."""

    def start() -> None:
        tier = DiskTier(CachePlace(cache / NAME, NAME), DiskShare.of_all(SPEC), 0, description())
        KVPools(SPEC, PoolSizes(host=1, disk=8), CpuDevice(), tier).close()

    lock = FolderLock(scratch)
    start()
    assert chunks(scratch) == {1}
    lock.release()
    (scratch / ARRAY / "zarr.json").unlink()
    (scratch / ARRAY / "thesis.txt").write_text("the only copy")
    start()
    assert chunks(scratch) == {1}
    (scratch / ARRAY / "thesis.txt").unlink()
    start()
    assert not (scratch / ARRAY).exists() and listed(cache / NAME) == {3, 0, 5}


@pytest.mark.parametrize("name", [CATALOGUE, DESCRIPTION, f"{ARRAY}/zarr.json"])
def test_damaged_folders_are_listed_and_pruned(cache: Path, name: str) -> None:
    folder = cache / NAME
    (folder / name).write_bytes(b"garbage" * 1000)
    code, text = distkv(cache, "ls")
    [row] = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if f"│ {NAME}" in line]
    is_known = "zarr" in name
    assert code == 0 and row[4] == ("3" if is_known else "?") and row[7] == "9.00 KiB"
    assert is_known or str(folder) in text.split("disk_kv_bytes")[1], "what is wrong is said below"
    code, text = distkv(cache, "prune", "--max-bytes", "1GiB")
    assert code == 0 and chunks(folder) == (set() if name == CATALOGUE else {3, 0, 5})
    assert not list(cache.rglob(f"*{DAMAGED}")), "what nobody can use is swept"
    code, text = distkv(cache, "prune", "--max-bytes", str(SPEC.page_bytes))
    assert code == 0 and chunks(folder) == (set() if name == CATALOGUE else {5}), "the one used last stays"


def test_pages_that_nobody_can_reach_are_pruned_first(cache: Path) -> None:
    """A kill may leave pages whose parents were never listed, however lately they were used."""
    with closing(Catalogue(cache / NAME)) as catalogue:
        newest = catalogue.entries()[-1]
        followers = [(6, 2, b"of 2", b"of 1"), (7, 1, b"of 1", b"never listed")]
        orphans = [newest._replace(slot=s, index=i, key=key, parent=before) for s, i, key, before in followers]
        catalogue.update([], orphans)
    for slot in (6, 7):
        for head in range(SPEC.num_kv_heads):
            own, copied = (cache / NAME / ARRAY / chunk_name(number, head) for number in (slot, 5))
            own.write_bytes(copied.read_bytes())
    code, text = distkv(cache, "prune", "--max-bytes", "1GiB")
    assert code == 0 and "2 pages given up, 6.00 KiB freed" in text
    assert chunks(cache / NAME) == listed(cache / NAME) == {3, 0, 5}


def test_a_catalogue_that_nobody_can_write(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prune` frees what it is to free; pages stay listed that count as missing."""

    def refuse(*_: object) -> None:
        raise StoreError("the catalogue cannot be written: database or disk is full")

    monkeypatch.setattr(Catalogue, "update", refuse)
    code, text = distkv(cache, "prune", "--max-bytes", "0")
    assert code == 0 and "3 pages given up, 9.00 KiB freed" in text and chunks(cache / NAME) == set()
    monkeypatch.undo()
    assert listed(cache / NAME) == {3, 0, 5}
    assert distkv(cache, "prune", "--max-bytes", "1GiB")[0] == 0
    assert listed(cache / NAME) == set()


def test_one_models_part_is_no_cache_though_it_is_damaged(cache: Path) -> None:
    (cache / NAME / DESCRIPTION).write_bytes(b"[]")
    result = CliRunner().invoke(app, ["cache", "ls", "--cache-dir", str(cache / NAME)])
    assert isinstance(result.exception, ConfigError) and "is one model's part of a cache" in str(result.exception)


def test_scratch_that_cannot_be_read_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be another user's."""

    def deny(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", deny)
    assert scratch_module.sweep_scratch(tmp_path) == 0
    assert "is not swept: files in" in caplog.text and "cannot be read: Permission denied" in caplog.text
