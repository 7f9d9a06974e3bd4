"""What can happen to the files of a cache folder."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distkv.storage.disk.cache_folder import CATALOGUE, DESCRIPTION
from distkv.storage.disk.page_arrays import ARRAY

Damage = Callable[[random.Random, Path, list[Path]], None]
"""Does something to a file; the others are those beside it."""


def flip(rng: random.Random, file: Path, _: list[Path]) -> None:
    """Changes a bit, in place."""
    with file.open("r+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        if size:
            place = rng.randrange(size)
            opened.seek(place)
            byte = opened.read(1)[0] ^ 1 << rng.randrange(8)
            opened.seek(place)
            opened.write(bytes([byte]))


def empty(rng: random.Random, file: Path, _: list[Path]) -> None:
    """Leaves nothing in it."""
    os.truncate(file, 0)


def halve(rng: random.Random, file: Path, _: list[Path]) -> None:
    """Leaves the first half."""
    os.truncate(file, file.stat().st_size // 2)


def zero(rng: random.Random, file: Path, _: list[Path]) -> None:
    """Leaves as many zeros."""
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))


def remove(rng: random.Random, file: Path, _: list[Path]) -> None:
    """Removes it."""
    file.unlink()


def swap(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Changes places with another one."""
    aside = file.with_name("swapped")
    other = rng.choice(others)
    if other != file:
        file.rename(aside)
        other.rename(file)
        aside.rename(other)


def garble(rng: random.Random, file: Path, _: list[Path]) -> None:
    """Writes something else over a stretch of it."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(rng.randrange(size) if size else 0)
        opened.write(rng.randbytes(rng.choice([1, 16, 500])))


ANY = flip, empty, halve, zero, remove, garble
OF_CHUNKS = flip, flip, flip, empty, halve, zero, remove, swap


def chunks(cache: Path) -> list[Path]:
    """The files of pages."""
    return sorted(cache.glob(f"*/{ARRAY}/c.*.0"))


def records(cache: Path) -> list[Path]:
    """The files that say what the pages are."""
    names = CATALOGUE, DESCRIPTION, f"{ARRAY}/zarr.json", f"{CATALOGUE}-wal"
    return sorted(path for name in names for path in cache.glob(f"*/{name}") if path.is_file())


def damage(rng: random.Random, files: list[Path], kinds: tuple[Damage, ...], count: int) -> str:
    """Damages so many of the files; returns what was done. One that is gone by now is passed over."""
    done = []
    for _ in range(count if files else 0):
        file, kind = rng.choice(files), rng.choice(kinds)
        with suppress(FileNotFoundError):
            kind(rng, file, files)
            done.append(f"{kind.__name__} {file.name}")
    return ", ".join(done)


def put_back(before: dict[Path, bytes]) -> str:
    """Puts old content in the place of new: a page that was there before, at its full length."""
    changed = [path for path, content in before.items() if path.exists() and path.read_bytes() != content]
    for path in changed:
        path.write_bytes(before[path])
    return f"{len(changed)} of {len(before)} files as they were before"


@contextmanager
def immutable(folder: Path) -> Iterator[None]:
    """Nobody, root included, can make, rename or remove files in a folder, or write those in it."""
    paths = [folder, *folder.rglob("*")]
    _set_immutable(paths, "+i")
    try:
        yield
    finally:
        _set_immutable(paths, "-i")


def _set_immutable(paths: list[Path], flag: str) -> None:
    for first in range(0, len(paths), 500):
        subprocess.run(["chattr", "-f", flag, *map(str, paths[first : first + 500])], check=False)
