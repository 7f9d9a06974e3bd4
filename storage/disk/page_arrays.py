"""The arrays of a cache folder, the files in them, and which of these a rank has.

A page is cut into files by its layers, its KV heads and its tokens. All layers lie in the array ARRAY, or those of each
stage of a pipeline in an array of their own, whose name says which. Layouts that cut otherwise find each other's pages
in one folder: who needs some layers takes them from whichever arrays have them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distkv.storage.page_spec import PageSpec

ARRAY = "kv.zarr"  # of all layers

_STAGE = re.compile(r"kv\.layers-(\d{1,9})-(\d{1,9})\.zarr")
_CHUNK = re.compile(r"c\.(\d+)\.0\.0\.(\d+)\.(\d+)\.(?:0|[0-9a-f.]*\.partial)")


@dataclass(frozen=True)
class PageArray:
    """One array of a folder."""

    layers: tuple[int, int] | None = None  # of the model, half-open; None for all of them
    num_parts: int = 1  # of a page's tokens, each a file

    @property
    def name(self) -> str:
        """Of its folder; it has the first and the last layer."""
        return ARRAY if self.layers is None else f"kv.layers-{self.layers[0]}-{self.layers[1] - 1}.zarr"

    def range(self, num_layers: int) -> tuple[int, int]:
        """Its layers, of so many that the model has."""
        return self.layers or (0, num_layers)

    def overlaps(self, layers: tuple[int, int], num_layers: int) -> bool:
        """Whether it has some of these layers."""
        first, end = self.range(num_layers)
        return first < layers[1] and layers[0] < end

    def spec(self, whole: PageSpec) -> PageSpec:
        """The pages in it, of one part of the tokens, from those of the whole model."""
        first, end = self.range(whole.num_layers)
        return replace(whole, num_layers=end - first)


WHOLE = PageArray()


@dataclass(frozen=True)
class DiskShare:
    """A rank's part of the model's pages on disk, as half-open ranges. Several ranks may have the same part."""

    heads: tuple[int, int]
    num_heads: int  # KV heads of the model
    layers: tuple[int, int]
    num_layers: int  # of the model
    part: int = 0  # of the tokens of a page
    num_parts: int = 1
    reports: bool = True  # checksums for the catalogue: no rank before this one has the same part
    writes: bool = True  # else another rank writes the same bytes to the same files
    is_first: bool = True  # of its engine on this disk, and so sweeps what belongs to none of the ranks

    @classmethod
    def of_all(cls, spec: PageSpec) -> "DiskShare":
        """That of a rank which has all of the model's pages."""
        return cls((0, spec.num_kv_heads), spec.num_kv_heads, (0, spec.num_layers), spec.num_layers)

    @property
    def array(self) -> PageArray:
        """Where it writes."""
        return PageArray(None if self.layers == (0, self.num_layers) else self.layers, self.num_parts)

    @property
    def place(self) -> tuple[int, int, int]:
        """Tells its part from others."""
        return self.layers[0], self.heads[0], self.part

    def empty_checksums(self) -> np.ndarray:
        """Those of a page of the whole model, as the catalogue has them: uint32 `[part, kv_head, layer]`."""
        return np.zeros((self.num_parts, self.num_heads, self.num_layers), dtype=np.uint32)

    def own(self, checksums: np.ndarray) -> np.ndarray:
        """The view `[kv_head, layer]` of them that is this rank's."""
        return checksums[self.part, slice(*self.heads), slice(*self.layers)]


class Chunk(NamedTuple):
    """A KV head of a page, or of a part of its tokens: what a file of an array holds, over all layers of that."""

    slot: int
    head: int
    part: int


def chunk_name(slot: int, head: int, part: int = 0) -> str:
    """The file of one KV head of a page, or of a part of its tokens, in the array's folder."""
    return f"c.{slot}.0.0.{head}.{part}.0"


def parse_chunk(name: str) -> Chunk | None:
    """What a chunk's file, or a write to it that has not ended, is of; None for other files."""
    match = _CHUNK.fullmatch(name)
    return None if match is None else Chunk(*map(int, match.groups()))


def find_arrays(folder: Path, num_parts: int = 1) -> list[PageArray]:
    """The arrays of a folder, that of all layers first. Raises OSError."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    stages = sorted((int(match[1]), int(match[2]) + 1) for name in names if (match := _STAGE.fullmatch(name)))
    found = [PageArray(None, num_parts)] if ARRAY in names else []
    return found + [PageArray(layers, num_parts) for layers in stages if layers[0] < layers[1]]


class Piece(NamedTuple):
    """Neighbouring layers of a page that lie in one array."""

    array: PageArray
    layers: tuple[int, int]  # of the model, half-open


def find_pieces(
    layers: tuple[int, int], num_layers: int, arrays: Iterable[PageArray], has: Callable[[PageArray], bool]
) -> list[Piece] | None:
    """Where some layers of a page lie, in their order; None where any is missing.

    Args:
        num_layers: of the model.
        arrays: those looked at first come first.
        has: whether an array has the page's files.
    """
    there = [(array, array.range(num_layers)) for array in arrays if has(array)]
    found: list[Piece] = []
    at, end = layers
    while at < end:
        piece = next(((array, last) for array, (first, last) in there if first <= at < last), None)
        if piece is None:
            return None
        found.append(Piece(piece[0], (at, min(piece[1], end))))
        at = piece[1]
    return found
