"""Whether all that lies in a cache_dir is whole: what is wrong is printed and, where that is wanted, repaired."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import track

from distkv.cache_folders.model_cache import ModelCache, elsewhere, find_caches
from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import (
    CATALOGUE,
    DESCRIPTION,
    LOCK,
    SCRATCH,
    DamagedError,
    FolderLock,
    remove_catalogue,
    take_away,
)
from distkv.storage.disk.catalogue import Entry
from distkv.storage.disk.disk_array import check_metadata, renew_metadata
from distkv.storage.disk.file_lock import is_locked
from distkv.storage.disk.removal import give_up, leftovers, num_bytes, sweep
from distkv.storage.disk.scratch import sweep_scratch


def verify_caches(
    console: Console, cache_dir: Path, repair: bool, verify_others: Callable[[], list[str]] = list
) -> bool:
    """Reads all of a cache_dir and prints what is wrong with what; returns whether all was whole.

    Args:
        repair: make it whole. Pages that are damaged are taken out, and those that follow them; files that belong to no
            page are removed; of files that say what lies there, those that are damaged are removed or made again.
        verify_others: does the same for what else lies there, and says what is wrong with it.

    Raises ConfigError when an engine uses a folder that is to be repaired, StoreError when one cannot be read now.
    """
    num_pages = 0
    with ExitStack() as stack:
        caches = find_caches(cache_dir)
        if repair:
            for cache in caches:
                stack.callback(FolderLock(cache.folder).release)
        found = verify_others()
        _print(console, found)
        for cache in caches:
            folder = _Folder(console, cache, repair)
            num_pages += folder.verify()
            found += folder.found
        scratch = cache_dir / SCRATCH
        if num_bytes(scratch) and not is_locked(scratch / LOCK):
            found.append(f"{scratch} holds pages of an engine that was killed, of no use to others")
            _print(console, found[-1:])
            if repair:
                sweep_scratch(cache_dir)
    console.print(f"{num_pages} pages read" + ("" if found else ", all whole"))
    return not found


class _Folder:
    """The pages of one model while they are verified."""

    def __init__(self, console: Console, cache: ModelCache, repair: bool):
        self._console, self._cache, self._repair = console, cache, repair
        self.found: list[str] = []  # all that is wrong

    def verify(self) -> int:
        """Returns how many pages were read."""
        folder = self._cache.folder
        if self._cache.is_listed_elsewhere:
            _print(self._console, [elsewhere(self._cache)])
            return 0
        is_known = True
        try:
            self._cache.check_catalogue()
            entries = self._cache.entries()
        except DamagedError as error:
            self._report(f"{error}, and nobody knows the pages that it listed")
            entries = []
            if self._repair:
                take_away(folder / CATALOGUE)
                remove_catalogue(folder)
            is_known = self._repair
        self._verify_pages(entries)
        self._verify_descriptions()
        if is_known:
            self._verify_rest()
        return len(entries)

    def _verify_pages(self, entries: list[Entry]) -> None:
        cache, stored = self._cache, self._cache.stored
        of_all = len(entries) < 2 or cache.spec is None or not stored.lacks()
        if not of_all:
            lacking = (
                f"{str(cache.folder)!r} has some layers or KV heads of none of its {len(entries)} pages: they lie on "
                "the disks of other nodes, or are lost, and are not looked at"
            )
            _print(self._console, [lacking])
        pages = track(entries, f"reading {cache.folder.name}", console=self._console, transient=True)
        found = {entry: problem for entry in pages if (problem := cache.damage(entry, stored, of_all))}
        # what an engine has given up meanwhile was not damaged
        damaged = {entry: problem for entry, problem in found.items() if entry.slot in _unchanged(cache, found)}
        for problem in damaged.values():
            self._report(problem)
        if self._repair and damaged:
            slots = _with_followers(entries, damaged)
            give_up(cache.folder, slots)
            self._console.print(
                f"{cache.name}: {len(slots)} pages taken out, {len(damaged)} of them damaged", soft_wrap=True
            )

    def _verify_descriptions(self) -> None:
        """What says which pages lie there; an engine makes again what is missing of it."""
        folder, cache = self._cache.folder, self._cache
        if cache.problem is not None:
            self._report(cache.problem)
            if self._repair:
                take_away(folder / DESCRIPTION)
        for array in cache.arrays:
            spec = None if cache.spec is None else array.spec(cache.spec)
            try:
                check_metadata(folder, spec, array)
            except DamagedError as error:
                self._report(str(error))
                if self._repair:
                    renew_metadata(folder, spec, max(cache.listed(), default=0) + 1, array)
            except ConfigError as error:
                self._report(str(error))

    def _verify_rest(self) -> None:
        """Files of no page, and pages that nobody can use. An engine is at writing what is not listed yet, so of a
        folder that one uses nothing is said."""
        folder = self._cache.folder
        if self._is_in_use():
            return
        files, useless = leftovers(folder, self._cache.listed()), self._cache.unreachable()
        if self._is_in_use():  # since just now
            return
        if files:
            self._report(f"{len(files)} files in {folder} belong to no page, such as {files[0].name}")
        if useless:
            self._report(f"{len(useless)} pages in {folder} follow one that is not there")
        if self._repair and (files or useless):
            give_up(folder, useless)
            sweep(folder)

    def _is_in_use(self) -> bool:
        return not self._repair and is_locked(self._cache.folder / LOCK)

    def _report(self, problem: str) -> None:
        self.found.append(problem)
        _print(self._console, [problem])


def _print(console: Console, problems: Iterable[str]) -> None:
    for problem in problems:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)


def _unchanged(cache: ModelCache, entries: Iterable[Entry]) -> set[int]:
    """The slots of those entries that are still listed as they were."""
    now = {(entry.slot, entry.key, entry.crc32c) for entry in cache.entries()}
    return {entry.slot for entry in entries if (entry.slot, entry.key, entry.crc32c) in now}


def _with_followers(entries: list[Entry], damaged: Iterable[Entry]) -> set[int]:
    """The slots of damaged pages and of all that follow them in their sequences."""
    lost = {entry.key for entry in damaged}
    for entry in sorted(entries, key=lambda entry: entry.index):
        if entry.index and entry.parent in lost:
            lost.add(entry.key)
    return {entry.slot for entry in entries if entry.key in lost}
