"""Pages on disk whose layers are read one after the other."""

import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from crc32c import crc32c

from distkv.storage.disk import page_cache
from distkv.storage.disk.file_codec import ChecksumDamage, FileCodec, FileDamage
from distkv.storage.disk.page_finder import PieceFiles
from distkv.storage.errors import StoreError
from distkv.storage.meter import Meter, now
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.disk_prefetch import DiskPrefetch

MAX_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # files that `OpenPages` holds open

_UNREAD = object()  # in place of a file's index

Result = TypeVar("Result")
Parts = list[list[memoryview]]
"""The memory of a layer slice, for each head the pieces in file order: keys, values."""


class PageFiles(Protocol):
    """Where pages on disk lie: a `DiskPool`."""

    spec: PageSpec
    meter: Meter
    prefetch_thread: Executor

    def pieces(self, slot: int) -> list[PieceFiles]:
        """See `DiskPool.pieces`."""
        ...

    def layer_checksums(self, slot: int) -> list[list[int]]:
        """See `DiskPool.layer_checksums`."""
        ...

    def told(self, file: str, error: OSError | FileDamage) -> StoreError:
        """See `DiskPool.told`."""
        ...


class OpenPages:
    """Pages of a `DiskPool` whose first layer is read page by page, then the second one, and so on, from several
    threads if need be. A context manager.

    The system is told what comes next (`DiskPrefetch`), but of a single page, which it reads ahead by itself. MAX_OPEN
    files stay open; the others are opened for each read.
    """

    def __init__(self, pool: PageFiles, slots: Sequence[int]):
        """Raises StoreError for a slot that holds no page."""
        self._pool = pool
        self._pieces = [pool.pieces(slot) for slot in slots]
        self._files = [[file for piece in pieces for file in piece.files] for pieces in self._pieces]
        self._checksums = [pool.layer_checksums(slot) for slot in slots]
        self._descriptors: list[list[int | None]] = [[None] * len(files) for files in self._files]
        self._indexes: list[list[Any]] = [[_UNREAD] * len(files) for files in self._files]
        self._prefetch = None
        if len(slots) > 1:
            self._prefetch = DiskPrefetch(pool.prefetch_thread, self._is_held, self._expect, len(slots), pool.spec)
        room = MAX_OPEN
        for files, descriptors in zip(self._files, self._descriptors, strict=True):
            for head, file in enumerate(files[: max(0, room)]):
                with suppress(OSError):  # `read` says why
                    descriptors[head] = self._open(file)
            room -= len(files)
        if self._prefetch is not None:
            self._prefetch.reach(0)

    def read(self, index: int, layer: int, parts: Parts) -> None:
        """Reads and checks one layer of the index-th page. Raises StoreError when it cannot be read back."""
        if self._prefetch is not None:
            self._prefetch.reach(layer * len(self._files) + index)
        checksums, start, num_bytes = self._checksums[index], now(), 0
        first, piece = self._piece(index, layer)
        for head, pieces in enumerate(parts):
            try:
                num_bytes += self._read(index, first + head, piece.codec, layer + piece.shift, pieces)
                if checksum(pieces) != checksums[head][layer]:
                    raise ChecksumDamage(f"is damaged: the checksum of layer {layer + piece.shift} is wrong")
            except (OSError, FileDamage) as error:
                raise self._pool.told(self._files[index][first + head], error) from error
        self._pool.meter.add("disk_read", start, num_bytes, layer=layer)

    def close(self) -> None:
        try:
            if self._prefetch is not None:
                self._prefetch.close()
        finally:
            for descriptors in self._descriptors:
                for head, descriptor in enumerate(descriptors):
                    if descriptor is not None:
                        os.close(descriptor)
                        descriptors[head] = None

    def __enter__(self) -> "OpenPages":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _piece(self, index: int, layer: int) -> tuple[int, PieceFiles]:
        """The piece of a page that has a layer, behind the number of its first file among those of the page."""
        first = 0
        for piece in self._pieces[index]:
            if layer < piece.end:
                return first, piece
            first += len(piece.files)
        raise IndexError(f"a page has no layer {layer}")

    def _read(self, index: int, number: int, codec: FileCodec, layer: int, pieces: list[memoryview]) -> int:
        """Returns how many bytes the file gave. Raises OSError or FileDamage."""
        descriptor, found = self._descriptors[index][number], self._indexes[index][number]
        if descriptor is not None and found is not _UNREAD:
            return codec.read(descriptor, found, layer, pieces)
        return self._with_file(index, number, codec, lambda *file: codec.read(file[0], file[1], layer, pieces))

    def _is_held(self, index: int, layer: int) -> bool:
        """Whether the system has a layer of the index-th page in its memory, by the first byte of a head."""
        number, piece = self._piece(index, layer)

        def look(descriptor: int, found: Any) -> bool:
            return page_cache.is_held(descriptor, piece.codec.span(found, layer + piece.shift)[0])

        try:
            return self._with_file(index, number, piece.codec, look)
        except (OSError, FileDamage):  # the system cannot tell, or `read` says why
            return False

    def _expect(self, index: int, first: int, last: int) -> None:
        """Has the system bring layers, from a first one to before a last one, of the index-th page."""
        while first < last:
            number, piece = self._piece(index, first)
            begin, end = first + piece.shift, min(last, piece.end) + piece.shift

            def tell(
                descriptor: int, found: Any, codec: FileCodec = piece.codec, begin: int = begin, end: int = end
            ) -> None:
                start, _ = codec.span(found, begin)
                offset, size = codec.span(found, end - 1)
                page_cache.bring(descriptor, start, offset + size - start)

            for file in range(number, number + len(piece.files)):
                with suppress(OSError, FileDamage):  # `read` says why
                    self._with_file(index, file, piece.codec, tell)
            first = piece.end

    def _with_file(self, index: int, number: int, codec: FileCodec, work: Callable[[int, Any], Result]) -> Result:
        """What work on a file, and its index, gives. Raises OSError, FileDamage and what the work does."""
        kept = self._descriptors[index][number]
        descriptor = self._open(self._files[index][number]) if kept is None else kept
        try:
            found = self._indexes[index][number]
            if found is _UNREAD:  # of two threads that read it at once, both find the same
                found = self._indexes[index][number] = codec.read_index(descriptor)
            return work(descriptor, found)
        finally:
            if kept is None:
                os.close(descriptor)

    def _open(self, file: str) -> int:
        """Raises OSError."""
        descriptor = os.open(file, os.O_RDONLY)
        if self._prefetch is not None:
            page_cache.read_nothing_ahead(descriptor)
        return descriptor


def checksum(pieces: list[memoryview]) -> int:
    """crc32c over pieces of memory, one after the other."""
    value = 0
    for piece in pieces:
        value = crc32c(piece, value)
    return value
