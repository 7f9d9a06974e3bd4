"""Takes over a folder of pages that an earlier process left, in whatever number of slots it has.

A kill at any moment leaves every page that the catalogue lists whole. It may leave files that are not listed, which
`DiskPool.adopt` sweeps away.
"""

import os
from contextlib import closing, suppress
from pathlib import Path

from distkv.storage.disk.cache_folder import (
    CATALOGUE,
    CATALOGUE_LOG,
    DESCRIPTION,
    DamagedError,
    Description,
    describe,
    take_away,
)
from distkv.storage.disk.catalogue import Catalogue, read_catalogue, set_aside_catalogue
from distkv.storage.disk.disk_array import fit_array, mend_array
from distkv.storage.disk.files import sync_file, sync_folder
from distkv.storage.disk.page_arrays import WHOLE, PageArray, chunk_name, find_arrays
from distkv.storage.disk.removal import give_up, sweep
from distkv.storage.errors import StoreError
from distkv.storage.page_spec import PageSpec


def reopen(folder: Path, spec: PageSpec, num_pages: int, description: Description, array: PageArray = WHOLE) -> None:
    """Makes an array of a locked folder, or fits the one found there to `num_pages` slots; pages in arrays of other
    layouts stay.

    Fewer slots keep the pages that were used last. What is damaged is set aside. Raises ConfigError when what lies
    there is somebody else's, StoreError when it cannot be written.

    Args:
        spec: of the array.
    """
    try:
        _reopen(folder, spec, num_pages, description, array)
    except StoreError as error:
        if isinstance(error, DamagedError):  # which shows when it is changed
            set_aside_catalogue(folder, error)
        elif not sweep(folder):  # that took the room which was missing, perhaps
            raise
        _reopen(folder, spec, num_pages, description, array)


def rejoin(folder: Path, spec: PageSpec, num_pages: int, array: PageArray = WHOLE) -> None:
    """Does the same for a rank on a node with a disk of its own. Catalogue and description lie with the leader; those
    that lie here are of an engine that was led from this node, and are taken away. Raises as `reopen` does."""
    if os.path.lexists(folder / CATALOGUE):
        set_aside_catalogue(folder, f"{str(folder)!r} has pages of an engine that was led from here and are given up")
    take_away(folder / DESCRIPTION)  # without both, `distkv cache` knows that the pages are listed elsewhere
    join(folder, spec, num_pages, array)


def join(folder: Path, spec: PageSpec, num_pages: int, array: PageArray) -> None:
    """Makes or fits the array of a rank's stage in a folder that a rank before it has taken over. Raises as `reopen`
    does."""
    mend_array(folder, spec, num_pages, array)
    fit_array(folder, spec, num_pages, array)


def _reopen(folder: Path, spec: PageSpec, num_pages: int, description: Description, array: PageArray) -> None:
    describe(folder, description)
    mend_array(folder, spec, num_pages, array)  # before anything else is changed
    if find_arrays(folder):
        _fit(folder, num_pages, spec.num_kv_heads, array.num_parts)
    fit_array(folder, spec, num_pages, array)


def _fit(folder: Path, num_pages: int, num_heads: int, num_parts: int) -> None:
    """Gives up what is of no use or has no room, and brings the rest into the first slots."""
    entries, listed = read_catalogue(folder)
    kept = entries[max(0, len(entries) - num_pages) :]
    taken = {entry.slot for entry in kept}
    give_up(folder, listed - taken)
    free = (slot for slot in range(num_pages) if slot not in taken)
    moves = [(entry, next(free)) for entry in kept if entry.slot >= num_pages]
    if not moves:
        return
    arrays = [folder / array.name for array in find_arrays(folder)]
    files = [(array, head, part) for array in arrays for head in range(num_heads) for part in range(num_parts)]
    old = [array / chunk_name(entry.slot, *file) for entry, _ in moves for array, *file in files]
    new = [array / chunk_name(slot, *file) for _, slot in moves for array, *file in files]
    try:
        for source, target in zip(old, new, strict=True):
            _link(source, target)
        for array in arrays:
            sync_folder(array)
        with closing(Catalogue(folder)) as catalogue:
            catalogue.update([entry.slot for entry, _ in moves], [entry._replace(slot=slot) for entry, slot in moves])
        with suppress(FileNotFoundError):  # SQLite has taken it in, unless somebody looks at the catalogue meanwhile
            sync_file(folder / CATALOGUE_LOG)
            sync_folder(folder)
        for source in old:
            source.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"pages in cache_dir {str(folder)!r} cannot be moved to fewer slots ({error.strerror}); leave "
            "disk_kv_bytes as it was, or remove the folder"
        ) from error


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name, in place of what no entry lists."""
    target.unlink(missing_ok=True)
    if source.exists():  # one that is not there is found out by `DiskPool.adopt`
        os.link(source, target)
