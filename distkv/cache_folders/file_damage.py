"""Whether a file of a page is what its checksums in the catalogue are of."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crc32c import crc32c

from distkv.storage.disk.disk_codec import PlainCodec, disk_codec
from distkv.storage.disk.file_codec import FileCodec, FileDamage
from distkv.storage.disk.lossless_codec import read_chunks, read_index
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier


def file_damage(path: Path, checksums: Sequence[int], spec: PageSpec | None) -> str | None:
    """What is wrong with one head of a page, as the end of a sentence that begins with its path; None when it is whole.

    Args:
        checksums: crc32c of each layer.
        spec: the pages, where they are known. Else a compressed file is checked by the checksums in itself alone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return damage_of(descriptor, checksums, spec)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def damage_of(descriptor: int, checksums: Sequence[int], spec: PageSpec | None) -> str | None:
    """The same for a file that is open; raises OSError when it cannot be read."""
    try:
        return _damage(descriptor, checksums, spec)
    except FileDamage as damage:
        return str(damage)


def _damage(descriptor: int, checksums: Sequence[int], spec: PageSpec | None) -> str | None:
    size, num_layers = os.fstat(descriptor).st_size, len(checksums)
    codec: FileCodec
    if spec is not None:
        slice_bytes = spec.slice_bytes_in(Tier.DISK) // spec.num_kv_heads
        codec = disk_codec(replace(spec, num_kv_heads=1))
        codec.check_size(size)
    elif _is_whole_shard(descriptor, num_layers, size):
        return None
    else:
        slice_bytes = size // num_layers
        codec = PlainCodec(slice_bytes, num_layers)
    index, content = codec.read_index(descriptor), memoryview(bytearray(slice_bytes))
    for layer, expected in enumerate(checksums):
        codec.read(descriptor, index, layer, [content[: slice_bytes // 2], content[slice_bytes // 2 :]])
        if crc32c(content) != expected:
            return f"is damaged: the checksum of layer {layer} is wrong"
    return None


def _is_whole_shard(descriptor: int, num_layers: int, size: int) -> bool:
    """Whether a file is a compressed one and its checksums are right. Raises FileDamage when only its index is."""
    try:
        index = read_index(descriptor, num_layers, size)
    except FileDamage:
        return False
    for layer in range(num_layers):
        read_chunks(descriptor, index, layer)
    return True
