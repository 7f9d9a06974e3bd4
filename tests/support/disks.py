"""Disk tiers of one rank, and disks without room."""

import errno
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.pages import SPEC, random_page

from distkv.storage.disk.cache_folder import Description
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.disk.disk_array import make_array
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.disk.reopen import reopen
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools import disk_pool as disk_module
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.tier import Tier

NUM_PAGES = 8


def disk_pool(folder: Path, spec: PageSpec = SPEC, num_pages: int = NUM_PAGES) -> DiskPool:
    """A disk tier of one rank."""
    make_array(folder, spec, num_pages)
    return DiskPool(spec, folder, num_pages, DiskShare.of_all(spec))


def share(spec: PageSpec, head: int = 0, num_heads: int | None = None, **fields: Any) -> DiskShare:
    """That of a rank with all layers, and the heads of `spec` from a first one on, of so many."""
    heads = head, head + spec.num_kv_heads
    return DiskShare(heads, num_heads or spec.num_kv_heads, (0, spec.num_layers), spec.num_layers, **fields)


def entry(slot: int, crc32c: bytes = b"") -> Entry:
    """The entry of a first page."""
    return Entry(slot, b"key %d" % slot, b"root", b"tokens", crc32c, last_use=0.0, index=0)


def description(spec: PageSpec = SPEC) -> Description:
    """Of the pages of a model whose folder is to be named "0123456789abcdef"."""
    return Description(
        "0123456789abcdef" * 4, "/models/one", spec.dtype, spec.page_size, spec.num_layers,
        spec.num_kv_heads, spec.head_dim, spec.page_bytes_in(Tier.DISK), spec.disk_codec,
    )  # fmt: skip


def kept_pages(folder: Path, slots: list[int], spec: PageSpec = SPEC) -> None:
    """Makes a folder of pages that outlive a process: first ones, in these slots, the last one used last."""
    folder.mkdir(exist_ok=True)
    reopen(folder, spec, NUM_PAGES, description(spec))
    pool = DiskPool(spec, folder, NUM_PAGES, DiskShare.of_all(spec))
    entries = []
    for now, slot in enumerate(slots):
        pool.store(slot, random_page(spec, slot))
        entries.append(entry(slot, pool.checksums(slot))._replace(last_use=float(now)))
    with closing(Catalogue(folder)) as catalogue:
        catalogue.update([], entries)


def listed(folder: Path) -> set[int]:
    """The slots that the catalogue lists."""
    with closing(Catalogue(folder, read_only=True)) as catalogue:
        return catalogue.slots()


def partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def limit_disk(patch: pytest.MonkeyPatch, num_files: int) -> None:
    """Lets all disk tiers of this process have no more than so many chunk files, one that is being written among
    them: a full disk where a file system of its own cannot be had."""
    write, lock = disk_module.replace_file, threading.Lock()

    def limited(path: Path, content: memoryview) -> None:
        with lock:
            if sum(1 for _ in path.parent.glob("c.*")) >= num_files:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, content)

    patch.setattr(disk_module, "replace_file", limited)
