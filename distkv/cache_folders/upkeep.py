"""What lies in a cache_dir, and how to make it smaller: printed, and done. `verify.py` looks whether it is whole."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from heapq import merge
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distkv.cache_folders.model_cache import ModelCache, elsewhere, find_cache, find_caches
from distkv.errors import StoreError
from distkv.storage.disk.cache_folder import LOCK, SCRATCH, FolderLock
from distkv.storage.disk.file_lock import is_locked
from distkv.storage.disk.removal import give_up, num_bytes, sizes, sweep
from distkv.storage.disk.scratch import sweep_scratch


def list_caches(console: Console, cache_dir: Path) -> None:
    """Prints a row per model, and one for pages without prefix caching. A prefix is a chain of pages that no longer one
    begins with."""
    caches = find_caches(cache_dir)
    scratch = cache_dir / SCRATCH
    in_scratch = num_bytes(scratch)
    if not caches and not in_scratch:
        console.print(f"{cache_dir} holds no KV pages", soft_wrap=True, highlight=False)
        return
    if not console.is_terminal:
        console.width = 160  # of a path and nine columns; a pipe has no width of its own
    table = Table("model", "fingerprint", "kernels", "codec", "pages", "prefixes", "tokens", "bytes", "last use")
    total, problems = in_scratch, []
    for cache in caches:
        columns, last_use = ["?", "?", "?", "?", "?"], "?"
        try:
            columns, last_use = _count(cache)
        except StoreError as error:
            problems.append(str(error))
        size = num_bytes(cache.folder)
        total += size
        table.add_row(cache.model, cache.folder.name, *columns, _size(size), last_use)
    if in_scratch:
        left_by = "an engine that runs" if is_locked(scratch / LOCK) else "an engine that was killed"
        table.add_row(f"no prefix caching, {left_by}", SCRATCH, "-", "-", "-", "-", "-", _size(in_scratch), "-")
    console.print(table, soft_wrap=True)
    console.print(f"{_size(total)} in all; disk_kv_bytes is for each model", soft_wrap=True, highlight=False)
    _print_problems(console, problems)


def prune_caches(console: Console, cache_dir: Path, max_bytes: int, model: str | None) -> None:
    """Gives up the pages that were used longest ago, of all models or of one, until their files take `max_bytes` at
    most; prints what that freed. What nobody can use goes first: files of pages that are not listed, pages that
    follow one that is not, and without `model` what an engine without prefix caching left when it was killed. Pages
    that another node lists stay.

    Args:
        model: the first digits of a fingerprint.

    Raises ConfigError when an engine uses one of the folders, or no model has that fingerprint.
    """
    caches = find_caches(cache_dir) if model is None else [find_cache(cache_dir, model)]
    _print_problems(console, [elsewhere(cache) for cache in caches if cache.is_listed_elsewhere])
    caches = [cache for cache in caches if not cache.is_listed_elsewhere]
    with ExitStack() as stack:
        _lock(stack, caches)
        if model is None and (freed := sweep_scratch(cache_dir)):
            console.print(f"{SCRATCH}: {_size(freed)} freed, left by an engine that was killed", soft_wrap=True)
        before = [num_bytes(cache.folder) for cache in caches]
        for cache in caches:
            sweep(cache.folder)
        by_slot = [sizes(cache.folder) for cache in caches]
        given_up = [cache.unreachable() for cache in caches]
        total = sum(
            size for one, gone in zip(by_slot, given_up, strict=True) for slot, size in one.items() if slot not in gone
        )
        for _, number, slot in merge(*(_by_last_use(number, cache) for number, cache in enumerate(caches))):
            if total <= max_bytes:
                break
            given_up[number].add(slot)
            total -= by_slot[number].get(slot, 0)
        for cache, slots, size in zip(caches, given_up, before, strict=True):
            give_up(cache.folder, slots)
            console.print(
                f"{cache.name}: {len(slots)} pages given up, {_size(size - num_bytes(cache.folder))} freed",
                soft_wrap=True,
            )
        console.print(f"{_size(sum(num_bytes(cache.folder) for cache in caches))} left", soft_wrap=True)


def _count(cache: ModelCache) -> tuple[list[str], str]:
    """Kernels, codec, pages, prefixes and tokens of a model, and when one was used last. Raises StoreError when that is
    not known."""
    entries = cache.entries()
    ends = {entry.key for entry in entries} - {entry.parent for entry in entries}
    tokens = len(entries) * cache.description.num_tokens
    last_use = _date(max(entry.last_use for entry in entries)) if entries else "-"
    known = cache.description
    codec = known.disk_codec if known.kv_cache_dtype == "auto" else known.kv_cache_dtype
    return [known.kernels or "?", codec, str(len(entries)), str(len(ends)), str(tokens)], last_use


def _print_problems(console: Console, problems: Iterable[str]) -> None:
    for problem in problems:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)


def _lock(stack: ExitStack, caches: Iterable[ModelCache]) -> None:
    for cache in caches:
        stack.callback(FolderLock(cache.folder).release)


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
