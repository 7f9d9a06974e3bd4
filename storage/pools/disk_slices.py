"""Layers of single KV heads of pages on disk, read as they are asked for."""

import os
from contextlib import suppress
from typing import Any, NamedTuple

from distkv.storage.disk import page_cache
from distkv.storage.disk.file_codec import ChecksumDamage, FileCodec, FileDamage
from distkv.storage.disk.page_finder import PieceFiles
from distkv.storage.errors import StoreError
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.open_pages import MAX_OPEN, checksum


class _File(NamedTuple):
    descriptor: int
    codec: FileCodec
    index: Any  # see `FileCodec.read_index`
    shift: int  # see `PieceFiles`
    is_kept: bool  # open, until all are closed


class DiskSlices:
    """Of a `DiskPool`. To be closed before any of the slots that were asked for is stored again; not for several
    threads at a time. MAX_OPEN files stay open until then."""

    def __init__(self, pool: DiskPool):
        self._pool = pool
        self._kept: dict[str, _File] = {}  # by path

    def expect(self, layer: int, wanted: list[tuple[int, int]]) -> None:
        """Has the system bring slices, by slot and head, into its memory side by side, which are read one by one
        then. It need not read ahead in these files."""
        for slot, head in wanted:
            with suppress(OSError, FileDamage, StoreError):  # `read` says why
                file = self._open(*self._place(slot, head, layer))
                try:
                    page_cache.bring(file.descriptor, *file.codec.span(file.index, layer + file.shift))
                finally:
                    if not file.is_kept:
                        os.close(file.descriptor)

    def read(self, layer: int, slot: int, head: int, memory: memoryview) -> int:
        """Reads and checks a layer of a head, keys and values into contiguous memory; returns how many bytes the file
        gave. Raises StoreError when it cannot be read back."""
        half = len(memory) // 2
        piece, path = self._place(slot, head, layer)
        try:
            file = self._open(piece, path)
            try:
                place = layer + file.shift
                num_bytes = file.codec.read(file.descriptor, file.index, place, [memory[:half], memory[half:]])
            finally:
                if not file.is_kept:
                    os.close(file.descriptor)
            if checksum([memory]) != self._pool.checksum(slot, head, layer):
                raise ChecksumDamage(f"is damaged: the checksum of layer {place} is wrong")
        except (OSError, FileDamage) as error:
            raise self._pool.told(path, error) from error
        return num_bytes

    def close(self) -> None:
        """Closes all files."""
        for file in self._kept.values():
            os.close(file.descriptor)
        self._kept = {}

    def _place(self, slot: int, head: int, layer: int) -> tuple[PieceFiles, str]:
        """Where a layer of a head lies. Raises StoreError where the slot holds no page."""
        piece = next(piece for piece in self._pool.pieces(slot) if layer < piece.end)
        return piece, piece.files[head]

    def _open(self, piece: PieceFiles, path: str) -> _File:
        """Raises OSError and FileDamage."""
        if path in self._kept:
            return self._kept[path]
        descriptor = os.open(path, os.O_RDONLY)
        try:
            page_cache.read_nothing_ahead(descriptor)
            index = piece.codec.read_index(descriptor)
            file = _File(descriptor, piece.codec, index, piece.shift, len(self._kept) < MAX_OPEN)
        except BaseException:
            os.close(descriptor)
            raise
        if file.is_kept:
            self._kept[path] = file
        return file
