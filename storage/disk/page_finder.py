"""Finds the pages that an earlier process left, as far as they are a rank's, and removes what is of no use."""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from distkv.storage.disk.disk_codec import disk_codec
from distkv.storage.disk.file_codec import FileCodec, FileDamage
from distkv.storage.disk.page_arrays import (
    Chunk,
    DiskShare,
    PageArray,
    chunk_name,
    find_arrays,
    find_pieces,
    parse_chunk,
)
from distkv.storage.errors import StoreError
from distkv.storage.page_spec import PageSpec

WRITE_BACK_SECONDS = 60.0  # in which the system has written by itself what a killed process left to it


class PieceFiles(NamedTuple):
    """Neighbouring layers of a rank's part of a page, as the files of one array have them."""

    end: int  # of the rank's layers, that behind them
    shift: int  # what is added to a layer of the rank to have that of the files
    files: list[str]  # one for each of the rank's heads
    codec: FileCodec


class PageFinder:
    """Looks for a rank's part of pages in its own array, and in those that other layouts have left in the folder."""

    def __init__(self, folder: Path, spec: PageSpec, share: DiskShare):
        """
        Args:
            spec: the rank's pages.
        """
        self._folder, self._spec, self._share = folder, spec, share
        self._heads = range(*share.heads)
        self._codecs: dict[PageArray, FileCodec] = {}
        self._whole: dict[PageArray, set[tuple[int, int]]] = {share.array: set()}  # slot and head of files
        # by slot the files of other layouts there, of whichever rank: they go when the slot is written
        self.strays: dict[int, list[str]] = defaultdict(list)

    def sweep(self, kept: Container[int], recent: Callable[[list[str]], None]) -> None:
        """Notes the files of some slots, and removes those of others: in its own array what this rank writes, in
        others all, if it is the first of its engine on the disk.

        Args:
            recent: is told of files that the system may have to write yet.

        Raises StoreError when an array cannot be read.
        """
        after = time.time() - WRITE_BACK_SECONDS
        for array in self._arrays(self._share.is_first):
            path, is_own = self._folder / array.name, array == self._share.array
            try:
                with os.scandir(path) as files:
                    for file in files:
                        chunk, is_partial = parse_chunk(file.name), file.name.endswith(".partial")
                        if is_partial or (chunk is not None and chunk.slot not in kept):
                            if self._removes(chunk) if is_own else self._share.is_first:
                                Path(file.path).unlink(missing_ok=True)
                        elif chunk is not None:
                            with suppress(FileNotFoundError, FileDamage):
                                found = file.stat()
                                self._note(array, chunk, file.path, found.st_size)
                                if found.st_mtime > after and self._is_own(chunk):
                                    recent([file.path])
            except OSError as error:
                if is_own or not isinstance(error, FileNotFoundError):  # which a rank removes of which none has any use
                    raise StoreError(f"{path} cannot be swept: {error.strerror}") from error

    def look(self, slots: Iterable[int]) -> None:
        """Notes this rank's files of some slots, and removes nothing. Raises StoreError when one cannot be read."""
        arrays = self._arrays(of_others=False)
        for slot in slots:
            for array in arrays:
                for head, name in zip(self._heads, self.names(array, slot), strict=True):
                    try:
                        self._note(array, Chunk(slot, head, self._share.part), name, os.stat(name).st_size)
                    except (FileNotFoundError, FileDamage):
                        continue
                    except OSError as error:
                        raise StoreError(f"{name} cannot be read: {error.strerror}") from error

    def find(self, slot: int) -> list[PieceFiles] | None:
        """Where this rank's part of a page is whole; None where it is nowhere."""

        def has(array: PageArray) -> bool:
            return all((slot, head) in self._whole[array] for head in self._heads)

        share = self._share
        pieces = find_pieces(share.layers, share.num_layers, self._whole, has)
        if pieces is None:
            return None
        found = []
        for array, (_, end) in pieces:
            shift = share.layers[0] - array.range(share.num_layers)[0]
            found.append(PieceFiles(end - share.layers[0], shift, self.names(array, slot), self._codec(array)))
        return found

    def lack(self, missing: list[int]) -> str:
        """What this rank has not found of some pages, and what that may come from."""
        share = self._share
        (first, end), (head, last) = share.layers, share.heads
        files = ((slot, head) for slot in missing for head in self._heads)
        lost = next((file for file in files if file not in self._whole[share.array]), (missing[0], head))
        part = f", part {share.part} of the tokens" if share.num_parts > 1 else ""
        return (
            f"{socket.gethostname()} has not all files of layers {first} to {end - 1} of KV heads {head} to {last - 1}"
            f"{part} of {len(missing)} pages, such as {share.array.name}/{chunk_name(*lost, share.part)} in "
            f"{str(self._folder)!r}. They are lost, or ranks of another layout wrote them to the disks of other nodes: "
            "a cache_dir that all nodes see is read by every layout"
        )

    def names(self, array: PageArray, slot: int) -> list[str]:
        """The files of this rank's heads."""
        path = f"{self._folder}/{array.name}"
        return [f"{path}/{chunk_name(slot, head, self._share.part)}" for head in self._heads]

    def _note(self, array: PageArray, chunk: Chunk, path: str, size: int) -> None:
        """Raises FileDamage for a file of this rank that cannot be whole."""
        if array != self._share.array and self._overlaps(array):
            self.strays[chunk.slot].append(path)
        if self._is_own(chunk):
            self._codec(array).check_size(size)
            self._whole.setdefault(array, set()).add((chunk.slot, chunk.head))

    def _is_own(self, chunk: Chunk) -> bool:
        return chunk.head in self._heads and chunk.part == self._share.part

    def _removes(self, chunk: Chunk | None) -> bool:
        """Whether this rank removes a file of its own array; None for one of the metadata."""
        is_own = self._share.place[1:] == (0, 0) if chunk is None else self._is_own(chunk)
        return is_own and self._share.writes

    def _arrays(self, of_others: bool) -> list[PageArray]:
        """This rank's own and those of other layouts that have layers of this rank.

        Args:
            of_others: those that have none, too.

        Raises StoreError.
        """
        own = self._share.array
        try:
            found = find_arrays(self._folder, own.num_parts)
        except OSError as error:
            raise StoreError(f"{self._folder} cannot be read: {error.strerror}") from error
        return [own, *(array for array in found if array != own and (of_others or self._overlaps(array)))]

    def _overlaps(self, array: PageArray) -> bool:
        """Whether an array has layers of this rank, so that no other stage of its engine writes there."""
        return array.overlaps(self._share.layers, self._share.num_layers)

    def _codec(self, array: PageArray) -> FileCodec:
        if array not in self._codecs:
            first, end = array.range(self._share.num_layers)
            self._codecs[array] = disk_codec(replace(self._spec, num_layers=end - first))
        return self._codecs[array]
