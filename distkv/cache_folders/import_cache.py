"""Takes pages in that `export_cache.py` has written, for engines of the same weights."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from distkv.cache_folders.export_format import Manifest, Table, page_member, read_manifest, read_table
from distkv.cache_folders.export_store import AGAIN, StoreReader, open_store
from distkv.cache_folders.file_damage import damage_of
from distkv.cache_folders.model_cache import find_caches
from distkv.errors import CapacityError, ConfigError, StoreError
from distkv.outputs import CacheImport
from distkv.storage.disk.cache_folder import DamagedError, Description, FolderLock
from distkv.storage.disk.catalogue import Catalogue, Entry, read_catalogue
from distkv.storage.disk.disk_array import find_slots
from distkv.storage.disk.disk_codec import disk_codec
from distkv.storage.disk.file_codec import FileDamage
from distkv.storage.disk.files import replace_file
from distkv.storage.disk.page_arrays import chunk_name, find_arrays
from distkv.storage.disk.removal import sweep
from distkv.storage.disk.reopen import reopen
from distkv.storage.disk.synced_pages import SyncedPages
from distkv.storage.ledger.page import PageKey
from distkv.storage.ledger.prefix_index import page_key, root_key
from distkv.storage.page_spec import PageSpec
from distkv.values import quoted, shown


class ImportedPage(NamedTuple):
    """A page that is to be taken in."""

    row: int  # in the file
    key: PageKey
    place: int  # in its sequence, 0 for a first page


class ExportedCache:
    """An exported cache that is open. What it says of itself and of its pages has been checked."""

    def __init__(self, path: Path, reader: StoreReader):
        """Raises StoreError when it is not whole, ConfigError when it is of a later version."""
        self.path, self._reader = path, reader
        self.manifest: Manifest = read_manifest(reader)
        self.table: Table = read_table(reader, self.manifest)
        self._codec = disk_codec(replace(self.spec, num_kv_heads=1))

    @property
    def pages(self) -> Description:
        """Whose pages they are."""
        return self.manifest.pages

    @property
    def spec(self) -> PageSpec:
        """The pages of the whole model."""
        return self.pages.spec

    def keyed(self, cache_salt: str | None) -> list[ImportedPage]:
        """The pages, each once and behind those before it, under keys that are made of their tokens."""
        root, found = root_key(self.pages.fingerprint, cache_salt), dict[bytes, ImportedPage]()
        digests: list[bytes] = []
        places: list[int] = []
        for row, (tokens, parent) in enumerate(zip(self.table.tokens, self.table.parents.tolist(), strict=True)):
            key = page_key(root if parent < 0 else digests[parent], tokens.tolist())
            places.append(0 if parent < 0 else places[parent] + 1)
            digests.append(key.digest)
            found.setdefault(key.digest, ImportedPage(row, key, places[row]))
        return list(found.values())

    def checksums(self, row: int) -> bytes:
        """Of a page, as the catalogue has them."""
        return self.table.checksums[row].tobytes()

    def copy(self, row: int, files: Sequence[Path]) -> None:
        """Writes a page to the files of a slot, see `slot_files`. Raises StoreError for a page that is missing or
        damaged, OSError for files that cannot be written."""
        for number, file in enumerate(files):
            replace_file(file, self._content(row, number))

    def verify(self) -> None:
        """Reads all pages. Raises StoreError when one is missing or damaged."""
        for row in range(len(self.table)):
            for number in range(self.pages.num_files):
                self._content(row, number)

    def _content(self, row: int, number: int) -> bytes:
        """A file of a page, which has its checksums."""
        name = self._member(row, number)
        try:
            self._codec.check_size(self._reader.size(name))
        except FileDamage as damage:
            raise StoreError(f"{name} in {str(self.path)!r} {damage}; {AGAIN}") from None
        content = self._reader.read(name)
        with open(os.memfd_create(name), "wb") as file:  # what checks files is used on it
            file.write(content)
            file.flush()
            problem = damage_of(file.fileno(), self.table.checksums[row, number].tolist(), self.spec)
        if problem is not None:
            raise StoreError(f"{name} in {str(self.path)!r} {problem}; {AGAIN}")
        return content

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Of the files of some pages."""
        numbers = range(self.pages.num_files)
        return sum(self._reader.size(self._member(row, number)) for row in rows for number in numbers)

    def _member(self, row: int, number: int) -> str:
        part, head = divmod(number, self.pages.num_kv_heads)
        return page_member(row, head, part)


def slot_files(folder: Path, slot: int, pages: Description) -> list[Path]:
    """Where a page is taken in: its files in the array of all layers, one for each head, those of a part of its tokens
    after those of the part before it. Every layout reads them there."""
    array = folder / pages.whole_array.name
    parts = range(pages.decode_context_parallel_size)
    return [array / chunk_name(slot, head, part) for part in parts for head in range(pages.num_kv_heads)]


@contextmanager
def open_exported(path: Path) -> Iterator[ExportedCache]:
    """Opens an exported cache. Raises as `ExportedCache` does, and ConfigError when there is none."""
    with open_store(path) as reader:
        yield ExportedCache(path, reader)


def check_same_pages(exported: ExportedCache, own: Description) -> None:
    """Raises ConfigError, with all that differs, where the pages are of no use to an engine of these others."""
    found = exported.pages
    if not _are_same(found, own):
        raise ConfigError(
            f"{str(exported.path)!r} has pages of {shown(found.model)} that are of no use to {own.model!r}: "
            f"{_difference(found, own)}. Use the same weights, options and kind of machine, or compute the pages again"
        )


def find_same_pages(exported: ExportedCache, cache_dir: Path) -> Description:
    """What a cache_dir says of the pages there that those of the file go with. Raises ConfigError when there are none,
    and DamagedError as `ModelCache` does."""
    caches = find_caches(cache_dir) if cache_dir.exists() else []
    known = [cache.description for cache in caches if not cache.is_listed_elsewhere]
    for own in known:
        if _are_same(exported.pages, own):
            return own
    others = "".join(f"; as to those of {own.model!r}, {_difference(exported.pages, own)}" for own in known)
    raise ConfigError(
        f"{str(exported.path)!r} has pages of {shown(exported.pages.model)}, and those in {str(cache_dir)!r} are none "
        f"with which they go{others}. Name the model's folder with --model, so that its weights are compared"
    )


def _are_same(found: Description, own: Description) -> bool:
    return (found.fingerprint, found.spec) == (own.fingerprint, own.spec)


def _difference(found: Description, own: Description) -> str:
    names = (
        "num_layers", "num_kv_heads", "head_dim", "dtype", "page_size", "decode_context_parallel_size",
        "kv_cache_dtype", "disk_codec", "kernels",
    )  # fmt: skip
    differing = [
        f"{name} is {quoted(there)} in the file and {here} here"
        for name in names
        if (there := getattr(found, name)) != (here := getattr(own, name))
    ]
    return ", ".join(differing) or "their weights differ, or what config.json says of them"


def import_pages(exported: ExportedCache, folder: Path, pages: Description, cache_salt: str | None) -> CacheImport:
    """Takes all pages in under a salt, or none, into the folder of a model that no engine uses, which may be a new one.

    Its array gets as many more slots as need be; an engine keeps as many as its disk_kv_bytes allows, those that were
    used last, and these are. Pages that are there already stay as they are.

    Raises ConfigError when an engine uses the folder, CapacityError when the disk has no room, StoreError when a page
    is damaged or cannot be written.
    """
    if not len(exported.table):
        return CacheImport(0, 0)
    lock = FolderLock(folder)
    try:
        return _import(exported, folder, pages, cache_salt)
    finally:
        lock.release()


def _import(exported: ExportedCache, folder: Path, pages: Description, cache_salt: str | None) -> CacheImport:
    entries, listed = read_catalogue(folder)
    sweep(folder)  # what a killed import has left, too
    known, taken = {entry.key for entry in entries}, {entry.slot for entry in entries}
    new = [page for page in exported.keyed(cache_salt) if page.key.digest not in known]
    _check_room(exported, folder, [page.row for page in new])
    num_slots = max(_num_slots(folder, pages, listed), len(taken) + len(new))
    reopen(folder, pages.spec, num_slots, pages, pages.whole_array)
    slots = list(islice((slot for slot in range(num_slots) if slot not in taken), len(new)))
    now = max([time.time(), *(entry.last_use for entry in entries)])
    added = []
    with _all_or_none(folder) as note:
        for slot, page in zip(slots, new, strict=True):
            exported.copy(page.row, note(slot_files(folder, slot, pages)))
            key = page.key
            checksums = exported.checksums(page.row)
            added.append(Entry(slot, key.digest, key.parent, key.tokens, checksums, now, page.place))
        with closing(Catalogue(folder)) as catalogue:
            catalogue.update([], added)
    return CacheImport(len(exported.table), len(new))


@contextmanager
def _all_or_none(folder: Path) -> Iterator[Callable[[list[Path]], list[Path]]]:
    """Takes files that are about to be written. They are synced at the end, and removed when anything is raised; raises
    StoreError when they cannot be written."""
    written: list[Path] = []
    synced = SyncedPages(folder, has_catalogue=True)

    def note(files: list[Path]) -> list[Path]:
        written.extend(files)
        synced.add(map(str, files))
        return files

    try:
        yield note
    except BaseException as error:
        for file in written:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(
                f"pages cannot be written to {str(folder)!r} ({error.strerror}), and none was taken in; make room on "
                "the disk"
            ) from error
        raise
    finally:
        synced.close()


def _check_room(exported: ExportedCache, folder: Path, rows: Sequence[int]) -> None:
    needed, free = exported.num_bytes(rows), shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(
            f"the {len(rows)} pages of {str(exported.path)!r} that are not in {str(folder)!r} take {needed} bytes, and "
            f"the disk there has {free} left; make room, or prune the cache (distkv cache prune)"
        )


def _num_slots(folder: Path, pages: Description, listed: set[int]) -> int:
    """Of the arrays that are there, as far as they can be read."""
    least = max(listed, default=-1) + 1
    for array in find_arrays(folder, pages.decode_context_parallel_size):
        with suppress(DamagedError):  # which `reopen` mends
            least = max(least, find_slots(folder, array.spec(pages.spec), array))
    return least
