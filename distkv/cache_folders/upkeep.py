"""What lies in a cache_dir, whether it is whole, and how to make it smaller: printed, and done."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from heapq import merge
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from distkv.cache_folders.model_cache import ModelCache, find_caches
from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import FolderLock
from distkv.storage.disk.catalogue import Entry


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
