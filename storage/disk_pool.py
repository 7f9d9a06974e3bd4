"""The disk tier: one rank's part of a plain Zarr array, written through zarr and read by preadv.

zarr writes a chunk to a temporary file and renames it, so a killed write leaves no torn chunk. It reads a missing chunk
as zeros and a damaged one without a word, and at a third of the speed; hence our own reading, checked by crc32c.
"""

import errno
import os
from pathlib import Path

import numpy as np
from crc32c import crc32c
from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.cache_folder import ARRAY, DiskHeads, open_array
from distkv.storage.host_memory import as_integers
from distkv.storage.page_pool import check_slot
from distkv.storage.page_spec import PageSpec


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
        bits = as_integers(page)
        self._stored[slot] = False
        for chunk in self._chunks:
            for layer in range(self._spec.num_layers):
                self._crcs[slot, chunk, layer] = _checksum(self._parts(bits[layer], chunk))
        first = self._heads.first
        try:
            self._array[slot, :, :, first : first + self._spec.num_kv_heads] = bits.view(self._array.dtype)
        except OSError as error:
            full = "; make room on the disk or lower disk_kv_bytes" if error.errno == errno.ENOSPC else ""
            raise StoreError(f"a KV page cannot be written to {self._folder}: {error.strerror}{full}") from error
        self._stored[slot] = True

    def load(self, slot: int, page: Tensor) -> None:
        check_slot(slot, self.num_pages)
        bits = as_integers(page)
        for chunk in self._chunks:
            self._read(slot, chunk, range(self._spec.num_layers), bits)

    def load_layer(self, slot: int, layer: int, out: Tensor) -> None:
        check_slot(slot, self.num_pages)
        bits = as_integers(out)[None]
        for chunk in self._chunks:
            self._read(slot, chunk, range(layer, layer + 1), bits)

    def checksums(self, slot: int) -> bytes:
        """crc32c of each chunk's layer slice, uint32 `[chunk, layer]` in C order."""
        return self._crcs[slot].tobytes()

    def chunk_path(self, slot: int, chunk: int) -> Path:
        """The file of the chunk-th part of this rank's heads."""
        return self._folder / f"c.{slot}.0.0.{self._heads.first // self._heads.per_chunk + chunk}.0.0"

    def close(self) -> None:
        """Nothing to give back: the files belong to the folder."""

    def _parts(self, slice_bits: np.ndarray, chunk: int) -> list[memoryview]:
        """The memory of a chunk's heads within a layer slice `[2, kv_head, page_size, head_dim]`, in file order."""
        if len(self._chunks) == 1:
            return [slice_bits.view(np.uint8).reshape(-1).data]
        heads = slice(chunk * self._heads.per_chunk, (chunk + 1) * self._heads.per_chunk)
        return [one[heads].view(np.uint8).reshape(-1).data for one in slice_bits]

    def _read(self, slot: int, chunk: int, layers: range, bits: np.ndarray) -> None:
        """Reads and checks a chunk's part of `layers` into `bits` `[len(layers), 2, kv_head, page_size, head_dim]`."""
        if not self._stored[slot]:
            raise StoreError(f"slot {slot} of {self._folder} holds no page")
        path = self.chunk_path(slot, chunk)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                for number, layer in enumerate(layers):
                    parts = self._parts(bits[number], chunk)
                    if os.preadv(descriptor, parts, layer * self._slice_bytes) != self._slice_bytes:
                        raise StoreError(f"{path} is cut short in layer {layer}")
                    if _checksum(parts) != self._crcs[slot, chunk, layer]:
                        raise StoreError(f"{path} is damaged: the checksum of layer {layer} is wrong")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _checksum(parts: list[memoryview]) -> int:
    value = 0
    for part in parts:
        value = crc32c(part, value)
    return value
