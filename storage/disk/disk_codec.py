"""Which codec the files of the disk tier have, and the one that leaves the bits as they are."""

import os
from collections.abc import Sequence

import numpy as np

from distkv.storage.disk.file_codec import FileCodec, FileDamage
from distkv.storage.disk.lossless_codec import LosslessCodec
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier


class PlainCodec:
    """A `FileCodec` whose files are the bits as they are, so that reads need no memory of their own."""

    def __init__(self, slice_bytes: int, num_layers: int):
        """
        Args:
            slice_bytes: of one head in one layer, keys and values.
        """
        self._slice_bytes, self._file_bytes = slice_bytes, slice_bytes * num_layers

    def encode(self, head: np.ndarray) -> memoryview:
        return np.ascontiguousarray(head).data

    def check_size(self, size: int) -> None:
        if size != self._file_bytes:
            raise FileDamage(f"has not the {self._file_bytes} bytes of a page's head")

    def read_index(self, descriptor: int) -> None:
        return None

    def span(self, index: None, layer: int) -> tuple[int, int]:
        return layer * self._slice_bytes, self._slice_bytes

    def read(self, descriptor: int, index: None, layer: int, pieces: Sequence[memoryview]) -> int:
        if os.preadv(descriptor, pieces, layer * self._slice_bytes) != self._slice_bytes:
            raise FileDamage(f"is cut short in layer {layer}")
        return self._slice_bytes


def disk_codec(spec: PageSpec) -> FileCodec:
    """That of `spec.disk_codec`."""
    if spec.disk_codec == "none":
        return PlainCodec(spec.slice_bytes_in(Tier.DISK) // spec.num_kv_heads, spec.num_layers)
    return LosslessCodec(spec)
