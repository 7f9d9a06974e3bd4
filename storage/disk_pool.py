"""The disk tier: one rank's part of a plain Zarr array, written through zarr and read by preadv.

zarr writes a chunk to a temporary file and renames it, so a killed write leaves no torn chunk. It reads a missing chunk
as zeros and a damaged one without a word, and at a third of the speed; hence our own reading, checked by crc32c.
"""

import errno
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from crc32c import crc32c
from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.cache_folder import ARRAY, DiskHeads, open_array
from distkv.storage.host_memory import as_integers
from distkv.storage.page_pool import check_slot
from distkv.storage.page_spec import PageSpec

MAX_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2  # files that `OpenPages` holds open

Parts = list[list[memoryview]]
"""The memory of a layer slice, for each chunk the pieces in file order."""


class DiskPool:
    """A `PagePool` over the KV heads of one rank; pages in different slots may be stored and loaded at the same time.

    The checksum of each chunk's layer slice is kept in memory; `checksums` gives those of a slot for the catalogue.
    """

    def __init__(self, spec: PageSpec, folder: Path, num_pages: int, heads: DiskHeads):
        """Opens the array that `cache_folder.make_array` made in `folder`."""
        self.num_pages = num_pages
        self._spec = spec
        self._heads = heads
        self._folder = folder / ARRAY
        self._array = open_array(folder)
        self._chunks = range(spec.num_kv_heads // heads.per_chunk)
        self._slice_bytes = spec.layer_slice_bytes // len(self._chunks)
        self._crcs = np.zeros((num_pages, len(self._chunks), spec.num_layers), dtype=np.uint32)
        self._stored = np.zeros(num_pages, dtype=bool)

    def store(self, slot: int, page: Tensor) -> None:
        """See `PagePool`. Raises StoreError when the disk does not take the page; the slot is empty then."""
        check_slot(slot, self.num_pages)
        self._stored[slot] = False
        for layer in range(self._spec.num_layers):
            for chunk, parts in enumerate(self.parts(page[layer])):
                self._crcs[slot, chunk, layer] = _checksum(parts)
        first = self._heads.first
        try:
            bits = as_integers(page).view(self._array.dtype)
            self._array[slot, :, :, first : first + self._spec.num_kv_heads] = bits
        except OSError as error:
            full = "; make room on the disk or lower disk_kv_bytes" if error.errno == errno.ENOSPC else ""
            raise StoreError(f"a KV page cannot be written to {self._folder}: {error.strerror}{full}") from error
        self._stored[slot] = True

    def load(self, slot: int, page: Tensor) -> None:
        with OpenPages(self, [slot]) as pages:
            for layer in range(self._spec.num_layers):
                pages.read(0, layer, self.parts(page[layer]))

    def load_layer(self, slot: int, layer: int, out: Tensor) -> None:
        with OpenPages(self, [slot]) as pages:
            pages.read(0, layer, self.parts(out))

    def open(self, slots: Sequence[int]) -> "OpenPages":
        """Several pages, to be read many times; to be closed before any of the slots is stored again."""
        return OpenPages(self, slots)

    def parts(self, layer_slice: Tensor) -> Parts:
        """The memory of a contiguous layer slice `[2, kv_head, page_size, head_dim]`, to read into."""
        assert layer_slice.is_contiguous()
        bits = as_integers(layer_slice)
        if len(self._chunks) == 1:
            return [[bits.view(np.uint8).reshape(-1).data]]
        size = self._heads.per_chunk
        return [
            [one[chunk * size : (chunk + 1) * size].view(np.uint8).reshape(-1).data for one in bits]
            for chunk in self._chunks
        ]

    def checksums(self, slot: int) -> bytes:
        """crc32c of each chunk's layer slice, uint32 `[chunk, layer]` in C order."""
        return self._crcs[slot].tobytes()

    def chunk_path(self, slot: int, chunk: int) -> Path:
        """The file of the chunk-th part of this rank's heads."""
        return self._folder / f"c.{slot}.0.0.{self._heads.first // self._heads.per_chunk + chunk}.0.0"

    def close(self) -> None:
        """Nothing to give back: the files belong to the folder."""

    def files(self, slot: int) -> list[Path]:
        """The files of a slot, one for each chunk."""
        check_slot(slot, self.num_pages)
        if not self._stored[slot]:
            raise StoreError(f"slot {slot} of {self._folder} holds no page")
        return [self.chunk_path(slot, chunk) for chunk in self._chunks]

    def layer_checksums(self, slot: int) -> list[list[int]]:
        """crc32c by chunk and layer."""
        return self._crcs[slot].tolist()

    @property
    def slice_bytes(self) -> int:
        """Bytes of a chunk's part of a layer slice."""
        return self._slice_bytes


class OpenPages:
    """Pages of a `DiskPool` that are read layer by layer, from several threads if need be. A context manager.

    MAX_OPEN files stay open, so that the system reads ahead in them; the others are opened for each read.
    """

    def __init__(self, pool: DiskPool, slots: Sequence[int]):
        """Raises StoreError for a slot that holds no page."""
        self._slice_bytes = pool.slice_bytes
        self._files = [pool.files(slot) for slot in slots]
        self._checksums = [pool.layer_checksums(slot) for slot in slots]
        self._descriptors: list[list[int | None]] = [[None] * len(files) for files in self._files]
        room = MAX_OPEN
        for files, descriptors in zip(self._files, self._descriptors, strict=True):
            for chunk, file in enumerate(files[: max(0, room)]):
                with suppress(OSError):  # `read` says why
                    descriptors[chunk] = os.open(file, os.O_RDONLY)
            room -= len(files)

    def read(self, index: int, layer: int, parts: Parts) -> None:
        """Reads and checks one layer of the index-th page. Raises StoreError when it cannot be read back."""
        for chunk, pieces in enumerate(parts):
            descriptor = self._descriptors[index][chunk]
            if descriptor is None:
                self._read_closed(index, chunk, layer, pieces)
            else:
                self._read(descriptor, index, chunk, layer, pieces)

    def close(self) -> None:
        for descriptors in self._descriptors:
            for chunk, descriptor in enumerate(descriptors):
                if descriptor is not None:
                    os.close(descriptor)
                    descriptors[chunk] = None

    def __enter__(self) -> "OpenPages":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_closed(self, index: int, chunk: int, layer: int, pieces: list[memoryview]) -> None:
        file = self._files[index][chunk]
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {error.strerror}") from error
        try:
            self._read(descriptor, index, chunk, layer, pieces)
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, index: int, chunk: int, layer: int, pieces: list[memoryview]) -> None:
        try:
            count = os.preadv(descriptor, pieces, layer * self._slice_bytes)
        except OSError as error:
            raise StoreError(f"{self._files[index][chunk]} cannot be read: {error.strerror}") from error
        if count != self._slice_bytes:
            raise StoreError(f"{self._files[index][chunk]} is cut short in layer {layer}")
        if _checksum(pieces) != self._checksums[index][chunk][layer]:
            raise StoreError(f"{self._files[index][chunk]} is damaged: the checksum of layer {layer} is wrong")


def _checksum(pieces: list[memoryview]) -> int:
    value = 0
    for piece in pieces:
        value = crc32c(piece, value)
    return value
