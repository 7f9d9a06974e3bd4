"""Disk tiers of one rank."""

import errno
import os
import threading
from pathlib import Path

import pytest
from support.pages import SPEC

from distkv.storage.disk.cache_folder import DiskHeads
from distkv.storage.disk.catalogue import Entry
from distkv.storage.disk.disk_array import make_array
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools import disk_pool as disk_module
from distkv.storage.pools.disk_pool import DiskPool

NUM_PAGES = 8


def disk_pool(folder: Path, spec: PageSpec = SPEC, num_pages: int = NUM_PAGES) -> DiskPool:
    """A disk tier of one rank."""
    make_array(folder, spec, num_pages)
    return DiskPool(spec, folder, num_pages, DiskHeads(0, spec.num_kv_heads))


def entry(slot: int, crc32c: bytes = b"") -> Entry:
    """The entry of a first page."""
    return Entry(slot, b"key %d" % slot, b"root", b"tokens", crc32c, last_use=0.0, index=0)


def partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


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
