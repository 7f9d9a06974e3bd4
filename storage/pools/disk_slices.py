"""Layers of single KV heads of pages on disk, read as they are asked for."""

import os
from contextlib import suppress
from typing import Any, NamedTuple

from distkv.storage.disk import page_cache
from distkv.storage.disk.file_codec import ChecksumDamage, FileDamage
from distkv.storage.errors import StoreError
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.open_pages import MAX_OPEN, checksum


class _File(NamedTuple):
    descriptor: int
    index: Any  # see `FileCodec.read_index`
    is_kept: bool  # open, until all are closed


class DiskSlices:
    """Of a `DiskPool`. To be closed before any of the slots that were asked for is stored again; not for several
    threads at a time. MAX_OPEN files stay open until then."""

    def __init__(self, pool: DiskPool):
        self._pool, self._codec = pool, pool.codec
        self._kept: dict[tuple[int, int], _File] = {}  # by slot and head

    def expect(self, layer: int, wanted: list[tuple[int, int]]) -> None:
        """Has the system bring slices, by slot and head, into its memory side by side, which are read one by one
        then. It need not read ahead in these files."""
        for slot, head in wanted:
            with suppress(OSError, FileDamage, StoreError):  # `read` says why
                file = self._kept.get((slot, head)) or self._open(slot, head)
                try:
                    page_cache.bring(file.descriptor, *self._codec.span(file.index, layer))
                finally:
                    if not file.is_kept:
                        os.close(file.descriptor)

    def read(self, layer: int, slot: int, head: int, memory: memoryview) -> int:
        """Reads and checks a layer of a head, keys and values into contiguous memory; returns how many bytes the file
        gave. Raises StoreError when it cannot be read back."""
        half = len(memory) // 2
        try:
            file = self._kept.get((slot, head)) or self._open(slot, head)
            try:
                num_bytes = self._codec.read(file.descriptor, file.index, layer, [memory[:half], memory[half:]])
            finally:
                if not file.is_kept:
                    os.close(file.descriptor)
            if checksum([memory]) != self._pool.checksum(slot, head, layer):
                raise ChecksumDamage(f"is damaged: the checksum of layer {layer} is wrong")
        except (OSError, FileDamage) as error:
            raise self._pool.told(self._pool.files(slot)[head], error) from error
        return num_bytes

    def close(self) -> None:
        """Closes all files."""
        for file in self._kept.values():
            os.close(file.descriptor)
        self._kept = {}

    def _open(self, slot: int, head: int) -> _File:
        """Raises OSError, FileDamage and StoreError."""
        descriptor = os.open(self._pool.files(slot)[head], os.O_RDONLY)
        try:
            page_cache.read_nothing_ahead(descriptor)
            file = _File(descriptor, self._codec.read_index(descriptor), len(self._kept) < MAX_OPEN)
        except BaseException:
            os.close(descriptor)
            raise
        if file.is_kept:
            self._kept[slot, head] = file
        return file
