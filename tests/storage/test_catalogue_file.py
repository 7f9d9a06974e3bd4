"""On a disk of its node the catalogue is its process's alone, and others read a copy; elsewhere it is shared."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.disks import entry, listed
from support.processes import kill, read_line, run_code, start_python

from distkv.storage.disk import mounts
from distkv.storage.disk.cache_folder import CATALOGUE, CATALOGUE_LOG
from distkv.storage.disk.catalogue import Catalogue, TakenOverError

INDEX = f"{CATALOGUE}-shm"  # which is mapped

BESIDE = """
import sys
from contextlib import closing
from pathlib import Path
from distkv.storage.disk import mounts
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.errors import StoreError

folder = Path(sys.argv[1])
mounts.file_system = lambda folder: sys.argv[2]
before = sorted(folder.iterdir())
with closing(Catalogue(folder, read_only=True)) as catalogue:
    print(catalogue.slots(), sorted(folder.iterdir()) == before)
try:
    catalogue = Catalogue(folder, wait=0.0)
    catalogue.claim("other")
    catalogue.close()
    print("claimed")
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["ext4", "lustre"])
def test_who_has_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(mounts, "file_system", lambda folder: kind)
    with closing(Catalogue(tmp_path)) as catalogue:
        catalogue.claim("this")
        catalogue.update([], [entry(3)])
        assert listed(tmp_path) == {3}, "which takes no lock away"
        is_local = kind == "ext4"
        files = {CATALOGUE, CATALOGUE_LOG} if is_local else {CATALOGUE, CATALOGUE_LOG, INDEX}
        assert {path.name for path in tmp_path.iterdir()} == files
        beside = run_code(BESIDE, tmp_path, kind).stdout.splitlines()
        if is_local:
            failure = f"the catalogue in {tmp_path} cannot be opened: database is locked"
            assert beside == ["{3} True", failure]
            catalogue.update([], [entry(5)])
        else:
            assert beside == ["{3} True", "claimed"]
            with pytest.raises(TakenOverError):
                catalogue.update([], [entry(5)])
    assert listed(tmp_path) == ({3, 5} if is_local else {3})
    assert [path.name for path in tmp_path.iterdir()] == [CATALOGUE], "nobody leaves anything"


WRITER = """
import sys
from itertools import count
from pathlib import Path
from distkv.storage.disk.catalogue import Catalogue, Entry

catalogue, numbers = Catalogue(Path(sys.argv[1])), count()
for line in sys.stdin:
    for _ in range(int(line)):
        number = next(numbers)
        slot = number % 40
        catalogue.update([], [Entry(slot, b"key %d" % slot, b"root", b"tokens", bytes(10_000), float(number), 0)])
    print(number, flush=True)
"""


def test_a_copy_is_whole_though_the_other_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, between its two files, the log is taken into the first one and begins anew."""
    writer = start_python(WRITER, tmp_path)
    copy, delays = shutil.copyfile, iter([500, 1, 500])

    def write(count: int) -> int:
        assert writer.stdin is not None
        writer.stdin.write(f"{count}\n")
        writer.stdin.flush()
        return int(read_line(writer))

    def copy_slowly(source: Path, target: Path) -> None:
        copy(source, target)
        write(next(delays, 1))

    monkeypatch.setattr(shutil, "copyfile", copy_slowly)
    try:
        number = write(300)
        with closing(Catalogue(tmp_path, read_only=True)) as beside:
            beside.check()
            found = sorted(round(entry.last_use) for entry in beside.entries())
        assert found == list(range(found[0], found[0] + 40)) and found[-1] > number + 1000
    finally:
        kill(writer)


REFUSED = """
import sys
from pathlib import Path
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.errors import StoreError

catalogue = Catalogue(Path(sys.argv[1]))
catalogue.update([], [Entry(3, b"key 3", b"root", b"tokens", b"", 0.0, 0)])
for slot in (4, 5):
    print("written", flush=True)
    sys.stdin.readline()
    try:
        catalogue.update([], [Entry(slot, b"key %d" % slot, b"root", b"tokens", b"", 0.0, 0)])
    except StoreError as error:
        print(error, catalogue.slots(), flush=True)
catalogue.close()
"""


@contextmanager
def immutable(paths: list[Path]) -> Iterator[None]:
    """Nobody can write these files, not even those who have them open."""
    if subprocess.run(["chattr", "+i", *paths], capture_output=True).returncode:
        subprocess.run(["chattr", "-i", *paths], capture_output=True)
        pytest.skip("needs the right to make files immutable; that no file is mapped is tested above")
    yield
    subprocess.run(["chattr", "-i", *paths], check=True)


def test_a_disk_that_becomes_read_only_ends_no_process(tmp_path: Path) -> None:
    process = start_python(REFUSED, tmp_path)
    assert process.stdin is not None
    assert read_line(process) == "written"
    with immutable([*tmp_path.iterdir(), tmp_path]):
        process.stdin.write("\n")
        process.stdin.flush()
        assert "cannot be written" in (said := read_line(process)) and said.endswith("{3}")
        assert read_line(process) == "written"
        assert listed(tmp_path) == {3}
    process.communicate("\n")
    assert process.returncode == 0 and listed(tmp_path) == {3, 5}


def test_a_look_where_nothing_can_be_written(tmp_path: Path) -> None:
    with closing(Catalogue(tmp_path)) as catalogue:
        catalogue.update([], [entry(3)])
    with immutable([*tmp_path.iterdir(), tmp_path]):
        assert listed(tmp_path) == {3} and os.listdir(tmp_path) == [CATALOGUE]
