"""Single KV heads of pages in a cache folder, whichever layouts of ranks have written them."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path

import numpy as np
from crc32c import crc32c

from distkv.cache_folders.file_damage import damage_of, file_damage
from distkv.storage.disk.cache_folder import Description
from distkv.storage.disk.disk_codec import disk_codec
from distkv.storage.disk.file_codec import FileDamage
from distkv.storage.disk.page_arrays import (
    WHOLE,
    Chunk,
    PageArray,
    Piece,
    chunk_name,
    find_arrays,
    find_pieces,
    parse_chunk,
)
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier


class StoredHeads:
    """Of one folder, with the arrays that it has now."""

    def __init__(self, folder: Path, known: Description | None):
        """
        Args:
            known: what lies there, where anything says so.
        """
        self._folder, self._known = folder, known
        self._arrays = find_arrays(folder)
        self._found: dict[PageArray, set[tuple[int, int]]] = {}  # heads and parts of which there is any page
        for array in self._arrays:
            with suppress(OSError):  # one that cannot be read has no pages
                chunks = [parse_chunk(name) for name in os.listdir(folder / array.name)]
                self._found[array] = {(chunk.head, chunk.part) for chunk in chunks if chunk is not None}

    def of(self, slot: int) -> list[Chunk]:
        """The heads of a page, those of a part after those of the part before it. Where nothing says how many there
        are, those from the first one on of which there is a file."""
        if self._known is not None:
            num_parts, num_heads = self._known.decode_context_parallel_size, self._known.num_kv_heads
        else:
            num_heads = _count(lambda head: self._is_there(Chunk(slot, head, 0)))
            num_parts = _count(lambda part: self._is_there(Chunk(slot, 0, part)))
        return [Chunk(slot, head, part) for part in range(num_parts) for head in range(num_heads)]

    def lacks(self) -> bool:
        """Whether there are layers or heads of which not one page has a file, and others: ranks on nodes with disks of
        their own have those, or they are lost. The description must be known."""
        known = self._known
        assert known is not None
        whole = [(0, known.num_layers)]
        return any(self._found.values()) and any(self._here(head, known.num_layers) != whole for head in self.of(0))

    def damage(self, head: Chunk, checksums: Sequence[int], of_all: bool = True) -> str | None:
        """What is wrong with the files of a head, naming the first such file; None when they are whole.

        Args:
            checksums: of each layer of the model.
            of_all: layers; else those of which `lacks` finds no page are not looked at.
        """
        num_layers = len(checksums)
        ranges = [(0, num_layers)] if of_all else self._here(head, num_layers)
        for array, _ in [piece for layers in ranges for piece in self._pieces(head, num_layers, layers)]:
            file = self._file(array, head)
            first, end = array.range(len(checksums))
            if problem := file_damage(file, checksums[first:end], self._spec(array)):
                return f"{file} {problem}"
        return None

    def read(self, head: Chunk, checksums: Sequence[int]) -> tuple[bytes, str | None]:
        """The content of a file of a head over all layers of the model, and what is wrong with it, as `damage` says it.
        Where layouts with a pipeline have written the page, it is made of several files. The description must be known.
        """
        pieces = self._pieces(head, len(checksums))
        try:
            if [piece.array.layers for piece in pieces] == [None]:
                # files are replaced and never changed, so what is checked is what is read
                with open(file := self._file(pieces[0].array, head), "rb") as opened:
                    problem = damage_of(opened.fileno(), checksums, self._spec(WHOLE))
                    return opened.read(), None if problem is None else f"{file} {problem}"
            return self._join(head, pieces, checksums), None
        except OSError as error:
            return b"", f"{error.filename} cannot be read: {error.strerror}"
        except FileDamage as damage:
            return b"", str(damage)

    def _join(self, head: Chunk, pieces: list[Piece], checksums: Sequence[int]) -> bytes:
        """Raises OSError, and FileDamage that names the file."""
        whole = self._spec(WHOLE)
        assert whole is not None
        half = whole.slice_bytes_in(Tier.DISK) // whole.num_kv_heads // 2
        content = np.zeros((len(checksums), 2, half), np.uint8)
        for array, (first, end) in pieces:
            file, spec, shift = self._file(array, head), array.spec(whole), array.range(len(checksums))[0]
            codec = disk_codec(replace(spec, num_kv_heads=1))
            with open(file, "rb") as opened:
                try:
                    index = codec.read_index(opened.fileno())
                    for layer in range(first, end):
                        codec.read(opened.fileno(), index, layer - shift, [one.data for one in content[layer]])
                        if crc32c(content[layer]) != checksums[layer]:
                            raise FileDamage(f"is damaged: the checksum of layer {layer - shift} is wrong")
                except FileDamage as damage:
                    raise FileDamage(f"{file} {damage}") from None
        rows, columns = whole.page_shape[-2:]
        bits = content.view(f"i{half // (rows * columns)}").reshape(len(checksums), 2, rows, columns)
        return bytes(disk_codec(replace(whole, num_kv_heads=1)).encode(bits))

    def _here(self, head: Chunk, num_layers: int) -> list[tuple[int, int]]:
        """The layers of which there is any page with this head and part."""
        having = [array.range(num_layers) for array, found in self._found.items() if (head.head, head.part) in found]
        there = [layer for layer in range(num_layers) if any(first <= layer < end for first, end in having)]
        runs: list[tuple[int, int]] = []
        for layer in there:
            if runs and runs[-1][1] == layer:
                runs[-1] = runs[-1][0], layer + 1
            else:
                runs.append((layer, layer + 1))
        return runs

    def _pieces(self, head: Chunk, num_layers: int, layers: tuple[int, int] | None = None) -> list[Piece]:
        """Where some layers of a head lie, or would lie, where one is missing; all unless they are given."""
        arrays, layers = [*self._arrays, WHOLE], layers or (0, num_layers)
        found = find_pieces(layers, num_layers, arrays, lambda array: self._file(array, head).exists())
        return found or find_pieces(layers, num_layers, arrays, lambda array: True) or []

    def _is_there(self, head: Chunk) -> bool:
        return any(os.path.exists(self._file(array, head)) for array in self._arrays)

    def _file(self, array: PageArray, head: Chunk) -> Path:
        return self._folder / array.name / chunk_name(*head)

    def _spec(self, array: PageArray) -> PageSpec | None:
        return None if self._known is None else array.spec(self._known.spec)


def _count(holds: Callable[[int], bool]) -> int:
    return sum(1 for _ in takewhile(holds, count()))
