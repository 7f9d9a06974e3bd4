"""The disk tier's lossless codec: a file is a shard of Zarr v3, which has the keys of each layer, and its values, as a
chunk that can be read and decoded alone.

A chunk's array `[page_size, head_dim]` is transposed, since numbers of one channel are of like size. Blosc then makes
planes of its bits, of which those of exponents become short and those of mantissas stay, and a crc32c comes behind:
Zarr's codecs `transpose`, `bytes`, `blosc` and `crc32c`. The index has offset and length of each chunk and a crc32c of
its own. It lies at the beginning, since files are read front to back.

Every stored byte is checked before Blosc sees it, and the caller checks what it made of them.
"""

import os
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
from crc32c import crc32c
from numcodecs import blosc

from distkv.storage.disk.file_codec import ChecksumDamage, FileDamage
from distkv.storage.page_spec import BLOSC_HEADER_BYTES, CHECKSUM_BYTES, INDEX_ENTRY_BYTES, PageSpec
from distkv.storage.tier import Tier

COMPRESSOR: Final = "lz4"
LEVEL = 9  # of Blosc's codecs the fastest; its levels differ in what packing takes, not in unpacking

MAX_OFFSET = 2**62  # in a file

blosc.use_threads = False  # whoever calls it has threads of their own; zarr sets it too

_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<4xIII")  # of Blosc: bytes when unpacked, bytes of a block, bytes with the header

Index = list[tuple[int, int, int]]
"""By layer: where its keys begin, where its values begin, which follow them, and where these end."""


class LosslessCodec:
    """A `FileCodec`."""

    def __init__(self, spec: PageSpec):
        self._shape = rows, columns = spec.page_shape[-2:]
        self._num_layers = spec.num_layers
        self._chunk_bytes = spec.slice_bytes_in(Tier.DISK) // spec.num_kv_heads // 2
        self._dtype = np.dtype(f"i{self._chunk_bytes // (rows * columns)}")
        self._index_bytes = _index_bytes(spec.num_layers)

    def encode(self, head: np.ndarray) -> bytes:
        chunks = [self._pack(piece) for layer in head for piece in layer]
        sizes = np.array([len(chunk) for chunk in chunks], dtype="<u8")
        index = np.stack([self._index_bytes + sizes.cumsum() - sizes, sizes], axis=1).astype("<u8").tobytes()
        return b"".join([index, _CRC.pack(crc32c(index)), *chunks])

    def check_size(self, size: int) -> None:
        added = BLOSC_HEADER_BYTES + CHECKSUM_BYTES
        least, most = (self._index_bytes + 2 * self._num_layers * (added + one) for one in (0, self._chunk_bytes))
        if not least <= size <= most:
            raise FileDamage(f"has not the {least} to {most} bytes of a page's head")

    def read_index(self, descriptor: int) -> Index:
        return read_index(descriptor, self._num_layers, self._chunk_bytes + BLOSC_HEADER_BYTES + CHECKSUM_BYTES)

    def span(self, index: Index, layer: int) -> tuple[int, int]:
        keys, _, end = index[layer]
        return keys, end - keys

    def read(self, descriptor: int, index: Index, layer: int, pieces: Sequence[memoryview]) -> int:
        chunks = read_chunks(descriptor, index, layer)
        for chunk, piece in zip(chunks, pieces, strict=True):
            self._unpack(chunk, layer, piece)
        return sum(map(len, chunks))

    def _pack(self, piece: np.ndarray) -> bytes:
        packed = blosc.compress(np.ascontiguousarray(piece.T), COMPRESSOR.encode(), LEVEL, blosc.BITSHUFFLE)
        return packed + _CRC.pack(crc32c(packed))

    def _unpack(self, stored: memoryview, layer: int, piece: memoryview) -> None:
        packed = stored[:-CHECKSUM_BYTES]
        unpacked_bytes, _, packed_bytes = _HEADER.unpack_from(packed)
        if (unpacked_bytes, packed_bytes) != (self._chunk_bytes, len(packed)):
            raise FileDamage(f"is damaged: layer {layer} is of another size")
        try:
            unpacked = blosc.decompress(packed)
        except RuntimeError as error:
            raise FileDamage(f"is damaged: layer {layer} cannot be unpacked ({error})") from error
        rows, columns = self._shape
        np.frombuffer(piece, self._dtype).reshape(rows, columns)[:] = (
            np.frombuffer(unpacked, self._dtype).reshape(columns, rows).T
        )


def read_index(descriptor: int, num_layers: int, most_bytes: int) -> Index:
    """That of an open file.

    Args:
        most_bytes: of a chunk.

    Raises OSError or FileDamage.
    """
    stored = os.pread(descriptor, _index_bytes(num_layers), 0)
    if len(stored) != _index_bytes(num_layers):
        raise FileDamage("is cut short in its index")
    if not _is_whole(stored):
        raise ChecksumDamage("is damaged: the checksum of its index is wrong")
    index: Index = []
    entries = np.frombuffer(stored, dtype="<u8", count=4 * num_layers).reshape(-1, 4).tolist()
    for layer, (keys, key_bytes, values, value_bytes) in enumerate(entries):
        sizes_fit = all(BLOSC_HEADER_BYTES + CHECKSUM_BYTES <= one <= most_bytes for one in (key_bytes, value_bytes))
        if not sizes_fit or keys + key_bytes != values or values > MAX_OFFSET:
            raise FileDamage(f"is damaged: its index is wrong in layer {layer}")
        index.append((keys, values, values + value_bytes))
    if os.fstat(descriptor).st_size != (end := index[-1][2]):
        raise FileDamage(f"has not the {end} bytes that its index tells of")
    return index


def read_chunks(descriptor: int, index: Index, layer: int) -> tuple[memoryview, memoryview]:
    """The keys and values of a layer as they are stored, with their checksums, which are right. Raises OSError or
    FileDamage."""
    keys, values, end = index[layer]
    stored = memoryview(os.pread(descriptor, end - keys, keys))
    if len(stored) != end - keys:
        raise FileDamage(f"is cut short in layer {layer}")
    chunks = stored[: values - keys], stored[values - keys :]
    if not all(map(_is_whole, chunks)):
        raise ChecksumDamage(f"is damaged: the checksum of layer {layer} is wrong")
    return chunks


def _index_bytes(num_layers: int) -> int:
    return 2 * num_layers * INDEX_ENTRY_BYTES + CHECKSUM_BYTES


def _is_whole(stored: bytes | memoryview) -> bool:
    """Whether the crc32c at the end is that of what comes before it."""
    return crc32c(stored[:-CHECKSUM_BYTES]) == _CRC.unpack_from(stored, len(stored) - CHECKSUM_BYTES)[0]
