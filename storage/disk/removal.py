"""What the files of a cache folder take, and how pages are taken out of one that is locked: where need be on a disk
without any room left."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path

from distkv.storage.disk.cache_folder import DAMAGED
from distkv.storage.disk.catalogue import Catalogue, read_catalogue
from distkv.storage.disk.page_arrays import find_arrays, parse_chunk
from distkv.storage.errors import StoreError

log = logging.getLogger(__name__)

NO_SLOT = -1  # of what belongs to no page: what was cut off, and what was set aside


def sizes(folder: Path) -> dict[int, int]:
    """Bytes of the files by slot or NO_SLOT, without those of which there is one each. An engine may be using them.
    Raises StoreError when they cannot be read."""
    found: dict[int, int] = defaultdict(int)
    with _failing(folder, "read"):
        for file, slot in _files(folder):
            with suppress(FileNotFoundError):  # it has replaced it
                found[slot] += file.stat(follow_symlinks=False).st_size
    return found


def num_bytes(folder: Path) -> int:
    """All that `sizes` has, which raises."""
    return sum(sizes(folder).values())


def leftovers(folder: Path, listed: Container[int]) -> list[Path]:
    """The files that belong to none of the pages that are listed. Raises StoreError when they cannot be read."""
    with _failing(folder, "read"):
        return [Path(file.path) for file, slot in _files(folder) if slot not in listed]


def sweep(folder: Path) -> bool:
    """Removes the files that belong to no page that is listed, and from the catalogue pages of which no file is left;
    whether there were any such files. Raises StoreError when what lies there cannot be read or removed."""
    _, listed = read_catalogue(folder)
    found = _remove_files(folder, lambda slot: slot not in listed)
    give_up(folder, listed - sizes(folder).keys())
    return found


def give_up(folder: Path, slots: set[int]) -> None:
    """Removes pages, first from the catalogue, so that a kill leaves every page that it lists whole. Where that cannot
    be written, which takes room, their files make some; and if they do not, pages stay listed that count as missing.
    Raises StoreError when files cannot be removed."""
    if not slots:
        return
    try:
        _strike_out(folder, slots)
    except StoreError:
        _remove_files(folder, slots.__contains__)
        try:
            _strike_out(folder, slots)
        except StoreError as error:
            log.warning("%s; it goes on listing %d pages that were removed", error, len(slots))
    else:
        _remove_files(folder, slots.__contains__)


def _strike_out(folder: Path, slots: set[int]) -> None:
    with closing(Catalogue(folder)) as catalogue:
        catalogue.update(slots, [])


def _remove_files(folder: Path, is_doomed: Callable[[int], bool]) -> bool:
    with _failing(folder, "read"):
        doomed = [file.path for file, slot in _files(folder) if is_doomed(slot)]
    with _failing(folder, "removed"):
        for path in doomed:
            Path(path).unlink(missing_ok=True)
    return bool(doomed)


@contextmanager
def _failing(folder: Path, verb: str) -> Iterator[None]:
    """Makes a StoreError of an OSError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"files in {str(folder)!r} cannot be {verb}: {error.strerror}") from error


def _files(folder: Path) -> Iterator[tuple["os.DirEntry[str]", int]]:
    """The files that hold pages, or once did, with their slots or NO_SLOT."""
    arrays = [folder / array.name for array in find_arrays(folder)]
    for file in chain.from_iterable(map(_scan, [*arrays, folder])):
        if file.name.endswith((".partial", DAMAGED)):
            yield file, NO_SLOT
        elif chunk := parse_chunk(file.name):
            yield file, chunk.slot


def _scan(folder: Path) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as files:
            yield from (file for file in files if file.is_file(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):  # there is no array, or an engine has removed it
        return
