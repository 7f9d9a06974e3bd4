"""`distkv cache`: what lies in a cache_dir, whether it is whole, and how to make it smaller."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from heapq import merge
from itertools import accumulate
from pathlib import Path

import numpy as np
from crc32c import crc32c
from rich.console import Console
from rich.progress import track
from rich.table import Table

from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import (
    ARRAY,
    CATALOGUE,
    SCRATCH,
    SESSIONS,
    FolderLock,
    chunk_name,
    parse_chunk,
    read_description,
)
from distkv.storage.disk.catalogue import Catalogue, Entry


class ModelCache:
    """The pages of one model, in a sub-folder of cache_dir."""

    def __init__(self, folder: Path):
        """Raises ConfigError when the folder is no model's."""
        found = read_description(folder)
        if found is None:
            raise ConfigError(f"{str(folder)!r} holds no KV pages")
        self.folder, self.description = folder, found

    @property
    def name(self) -> str:
        return f"{self.description.model} ({self.folder.name})"

    def entries(self) -> list[Entry]:
        """See `Catalogue.entries`; an engine may be using the folder."""
        if not (self.folder / CATALOGUE).exists():
            return []
        with closing(Catalogue(self.folder, read_only=True)) as catalogue:
            return catalogue.entries()

    def num_bytes(self) -> int:
        """Of the array's files; the catalogue is small beside them, and has helpers that come and go."""
        total = 0
        for path in (self.folder / ARRAY).glob("*"):
            with suppress(FileNotFoundError):  # an engine replaces it
                total += path.stat().st_size
        return total

    def damage(self, entry: Entry) -> str | None:
        """What is wrong with the files of a page, naming the first such file; None when they are whole."""
        shape = self.description.num_kv_heads, self.description.num_layers
        checksums = np.frombuffer(entry.crc32c, np.uint32)
        if checksums.size != shape[0] * shape[1]:
            return (
                f"the catalogue has {checksums.size} checksums for slot {entry.slot}, and {shape[0] * shape[1]} are due"
            )
        size = self.description.page_bytes // shape[0]
        memory = memoryview(bytearray(size + 1))  # one more, so that too long a file is noticed
        for head, expected in enumerate(checksums.reshape(shape).tolist()):
            path = self.folder / ARRAY / chunk_name(entry.slot, head)
            try:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    count = os.preadv(descriptor, [memory], 0)
                finally:
                    os.close(descriptor)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}"
            if count != size:
                return f"{path} has not the {size} bytes of a page's head"
            step = size // shape[1]
            for layer, checksum in enumerate(expected):
                if crc32c(memory[layer * step : (layer + 1) * step]) != checksum:
                    return f"{path} is damaged: the checksum of layer {layer} is wrong"
        return None

    def remove(self, slots: set[int]) -> None:
        """Takes pages out; the folder must be locked."""
        with closing(Catalogue(self.folder)) as catalogue:
            catalogue.update(slots, [])
        for slot in slots:
            for head in range(self.description.num_kv_heads):
                (self.folder / ARRAY / chunk_name(slot, head)).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes the files of pages that are not listed; the folder must be locked."""
        listed = {entry.slot for entry in self.entries()}
        for path in (self.folder / ARRAY).glob("c.*"):
            chunk = parse_chunk(path.name)
            if chunk is not None and (chunk[0] not in listed or path.suffix == ".partial"):
                path.unlink(missing_ok=True)


def find_caches(cache_dir: Path) -> list[ModelCache]:
    """The models of which pages lie in a cache_dir; raises ConfigError when it is none."""
    if not cache_dir.is_dir():
        raise ConfigError(f"cache_dir {str(cache_dir)!r} is no folder; name the cache_dir of an engine")
    if read_description(cache_dir) is not None:
        raise ConfigError(f"{str(cache_dir)!r} is one model's part of a cache; name the folder above it")
    folders = sorted(path for path in cache_dir.iterdir() if path.name not in (SCRATCH, SESSIONS))
    caches = [ModelCache(folder) for folder in folders if read_description(folder) is not None]
    if folders and not caches and not any((cache_dir / name).is_dir() for name in (SCRATCH, SESSIONS)):
        raise ConfigError(f"{str(cache_dir)!r} is not a cache of KV pages; name the cache_dir of an engine")
    return caches


def list_caches(console: Console, cache_dir: Path) -> None:
    """Prints a row per model. A prefix is a chain of pages that no longer one begins with."""
    caches = find_caches(cache_dir)
    if not caches:
        console.print(f"{cache_dir} holds no KV pages", soft_wrap=True, highlight=False)
        return
    if not console.is_terminal:
        console.width = 160  # of a path and seven columns; a pipe has no width of its own
    table = Table("model", "fingerprint", "pages", "prefixes", "tokens", "bytes", "last use")
    for cache in caches:
        entries = cache.entries()
        ends = {entry.key for entry in entries} - {entry.parent for entry in entries}
        table.add_row(
            cache.description.model, cache.folder.name, str(len(entries)), str(len(ends)),
            str(len(entries) * cache.description.page_size), _size(cache.num_bytes()),
            _date(max(entry.last_use for entry in entries)) if entries else "-",
        )  # fmt: skip
    console.print(table, soft_wrap=True)


def verify_caches(console: Console, cache_dir: Path, remove: bool) -> bool:
    """Reads all pages and prints what is wrong with which; returns whether all are whole.

    Args:
        remove: take the damaged pages out, and those that follow them. Raises ConfigError when an engine uses them.
    """
    with ExitStack() as stack:
        caches = find_caches(cache_dir)
        if remove:
            _lock(stack, caches)
        whole, num_pages = True, 0
        for cache in caches:
            entries = cache.entries()
            found = {}
            for entry in track(entries, f"reading {cache.folder.name}", console=console, transient=True):
                if problem := cache.damage(entry):
                    found[entry] = problem
            # what an engine has given up meanwhile was not damaged
            damaged = {entry: problem for entry, problem in found.items() if entry.slot in _unchanged(cache, found)}
            for problem in damaged.values():
                console.print(problem, soft_wrap=True, highlight=False)
            num_pages += len(entries)
            whole = whole and not damaged
            if remove and damaged:
                slots = _with_followers(entries, damaged)
                cache.remove(slots)
                console.print(
                    f"{cache.name}: {len(slots)} pages taken out, {len(damaged)} of them damaged", soft_wrap=True
                )
    console.print(f"{num_pages} pages read" + (", all whole" if whole else ""))
    return whole


def prune_caches(console: Console, cache_dir: Path, max_bytes: int, model: str | None) -> None:
    """Gives up the pages that were used longest ago, of all models or of one, until their files take `max_bytes` at
    most; prints what that freed.

    Args:
        model: the first digits of a fingerprint.

    Raises ConfigError when an engine uses one of the folders, or no model has that fingerprint.
    """
    caches = find_caches(cache_dir)
    if model is not None:
        known = ", ".join(cache.folder.name for cache in caches) or "none"
        caches = [cache for cache in caches if cache.description.fingerprint.startswith(model)]
        if len(caches) != 1:
            raise ConfigError(f"{len(caches)} models have a fingerprint that begins with {model!r}; there are: {known}")
    with ExitStack() as stack:
        _lock(stack, caches)
        before = [cache.num_bytes() for cache in caches]
        for cache in caches:
            cache.sweep()
        total = sum(cache.num_bytes() for cache in caches)
        given_up: list[set[int]] = [set() for _ in caches]
        for _, number, slot in merge(*(_by_last_use(number, cache) for number, cache in enumerate(caches))):
            if total <= max_bytes:
                break
            given_up[number].add(slot)
            total -= caches[number].description.page_bytes
        for cache, slots, size in zip(caches, given_up, before, strict=True):
            if slots:
                cache.remove(slots)
            console.print(
                f"{cache.name}: {len(slots)} pages given up, {_size(size - cache.num_bytes())} freed", soft_wrap=True
            )
        console.print(f"{_size(sum(cache.num_bytes() for cache in caches))} left", soft_wrap=True)


def _lock(stack: ExitStack, caches: Iterable[ModelCache]) -> None:
    for cache in caches:
        stack.callback(FolderLock(cache.folder).release)


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


def _by_last_use(number: int, cache: ModelCache) -> Iterator[tuple[float, int, int]]:
    """(last use of the page or of one that follows it, `number`, slot), in the order in which pages may be given up."""
    entries = cache.entries()
    for used, entry in zip(accumulate((entry.last_use for entry in entries), max), entries, strict=True):
        yield used, number, entry.slot


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
