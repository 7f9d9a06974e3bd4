"""The disk tier: one rank's heads of a Zarr array, whose files are written and read here, each by a `FileCodec`.

A file is written to a temporary file and renamed, so a killed write leaves no torn one. zarr itself reads a missing
chunk as zeros and a damaged one without a word, at a third of the speed, and when the disk takes one head of a page no
more it does not say when its writes of the others have ended.
"""

import os
import time
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from distkv.storage.disk.cache_folder import ARRAY, FULL, DiskHeads, chunk_name, parse_chunk
from distkv.storage.disk.disk_codec import disk_codec
from distkv.storage.disk.file_codec import ChecksumDamage, FileDamage
from distkv.storage.disk.files import replace_file
from distkv.storage.disk.synced_pages import SyncedPages
from distkv.storage.errors import StoreError
from distkv.storage.meter import Meter, now
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.host_memory import as_integers
from distkv.storage.pools.open_pages import OpenPages, Parts, checksum
from distkv.storage.pools.page_pool import check_slot
from distkv.storage.tier import Tier

WRITE_BACK_SECONDS = 60.0  # in which the system has written by itself what a killed process left to it


class DiskPool:
    """A `PagePool` over the KV heads of one rank; pages in different slots may be stored and loaded at the same time.

    The checksum of each head's layer slice is kept in memory; `checksums` gives those of a slot for the catalogue.
    """

    def __init__(
        self,
        spec: PageSpec,
        folder: Path,
        num_pages: int,
        heads: DiskHeads,
        meter: Meter | None = None,
        synced: SyncedPages | None = None,
    ):
        """For the array that lies in `folder`, of at least so many slots.

        Args:
            synced: takes care that pages outlive a loss of power.
        """
        self.meter = meter or Meter()
        self.num_pages = num_pages
        self.spec = spec
        self.codec = disk_codec(spec)
        self._heads = heads
        self._synced = synced
        self._held = range(heads.first, heads.first + spec.num_kv_heads)
        self.folder = folder
        self.nbytes = num_pages * spec.page_bytes_in(Tier.DISK)
        self._array = str(folder / ARRAY)
        self._crcs = np.zeros((num_pages, spec.num_kv_heads, spec.num_layers), dtype=np.uint32)
        self._stored = np.zeros(num_pages, dtype=bool)
        self.prefetch_thread: Executor = ThreadPoolExecutor(1, "kv-prefetch")

    def store(self, slot: int, page: Tensor) -> None:
        """See `PagePool`. A rank that shares its heads with the one that writes them takes the checksums alone.

        Raises StoreError when the disk does not take the page; the slot is empty then.
        """
        check_slot(slot, self.num_pages)
        self._stored[slot] = False
        for layer in range(self.spec.num_layers):
            for head, parts in enumerate(self.parts(page[layer])):
                self._crcs[slot, head, layer] = checksum(parts)
        if self._heads.writes:
            try:
                self._write(slot, page)
            except OSError as error:
                full = "; make room on the disk or lower disk_kv_bytes" if error.errno in FULL else ""
                raise StoreError(f"a KV page cannot be written to {self._array}: {error.strerror}{full}") from error
        self._stored[slot] = True

    def load(self, slot: int, page: Tensor) -> None:
        with OpenPages(self, [slot]) as pages:
            memory, size = _bytes(page), self.spec.slice_bytes_in(Tier.DISK)
            for layer in range(self.spec.num_layers):
                pages.read(0, layer, self._split(memory[layer * size : (layer + 1) * size]))

    def open(self, slots: Sequence[int]) -> OpenPages:
        """Several pages, to be read layer by layer; to be closed before any of the slots is stored again."""
        return OpenPages(self, slots)

    def adopt(self, entries: dict[int, bytes]) -> list[int]:
        """Takes over the pages that an earlier process left, and no others; to be called before any page is stored.

        Args:
            entries: by slot the checksums of the whole model, uint32 `[kv_head, layer]` in C order.

        Returns the slots of pages that this rank cannot read: a file is missing or has another size, or the checksums
        are not this model's. Files of other pages, and of writes that were cut off, are removed where they belong to
        heads that this rank writes. Raises StoreError when the folder cannot be read.
        """
        self._stored[:] = False
        return self._take_over(entries, set(self._sweep(entries)))

    def take_in(self, entries: dict[int, bytes]) -> list[int]:
        """Takes over pages that somebody else has put into free slots meanwhile, as `adopt` does, and removes nothing.
        Raises StoreError when the folder cannot be read."""
        whole: set[tuple[int, int]] = set()
        for slot in entries:
            for head, name in zip(self._held, self._names(slot), strict=True):
                try:
                    self.codec.check_size(os.stat(name).st_size)
                except (FileNotFoundError, FileDamage):
                    continue
                except OSError as error:
                    raise StoreError(f"{name} cannot be read: {error.strerror}") from error
                whole.add((slot, head))
            if self._synced is not None:
                self._synced.add(self._names(slot))
        return self._take_over(entries, whole)

    def parts(self, layer_slice: Tensor) -> Parts:
        """The memory of a contiguous layer slice `[2, kv_head, page_size, head_dim]`, to read into."""
        return self._split(_bytes(layer_slice))

    def checksums(self, slot: int) -> bytes:
        """This rank's part of a slot's entry in the catalogue: crc32c of each head's layer slice, uint32
        `[kv_head, layer]` in C order. Empty where an earlier rank holds the same heads."""
        return self._crcs[slot].tobytes() if self._heads.reports else b""

    def chunk_path(self, slot: int, head: int) -> Path:
        """The file of one of this rank's heads, counted on the rank."""
        return Path(self.files(slot)[head])

    def close(self) -> None:
        """Syncs what is left. The files belong to the folder."""
        self.prefetch_thread.shutdown()
        if self._synced is not None:
            self._synced.close()

    def files(self, slot: int) -> list[str]:
        """The files of a slot, one for each head."""
        check_slot(slot, self.num_pages)
        if not self._stored[slot]:
            raise StoreError(f"slot {slot} of {self._array} holds no page")
        return self._names(slot)

    def checksum(self, slot: int, head: int, layer: int) -> int:
        """crc32c of one head's layer slice."""
        return int(self._crcs[slot, head, layer])

    def told(self, file: str, error: OSError | FileDamage) -> StoreError:
        """The error of a file that cannot be read back, which is counted if its content is another than was written."""
        if isinstance(error, OSError):
            return StoreError(f"{file} cannot be read: {error.strerror}")
        if isinstance(error, ChecksumDamage):
            self.meter.count_checksum_failure()
        return StoreError(f"{file} {error}")

    def layer_checksums(self, slot: int) -> list[list[int]]:
        """crc32c by head and layer."""
        return self._crcs[slot].tolist()

    def _take_over(self, entries: dict[int, bytes], whole: Container[tuple[int, int]]) -> list[int]:
        """Notes the checksums of pages whose files, as slot and head, are all `whole`; returns the slots of others."""
        shape = self._heads.total, self.spec.num_layers
        missing = []
        for slot, checksums in entries.items():
            crcs = np.frombuffer(checksums, np.uint32) if len(checksums) % 4 == 0 else np.empty(0)
            files = all((slot, head) in whole for head in self._held)
            if slot >= self.num_pages or crcs.size != shape[0] * shape[1] or not files:
                missing.append(slot)
                continue
            self._crcs[slot] = crcs.reshape(shape)[self._held.start : self._held.stop]
            self._stored[slot] = True
        return missing

    def _write(self, slot: int, page: Tensor) -> None:
        """What lay in the slot is removed first, so that on a full disk its room does, whoever else is writing. Leaves
        no part of a page. Raises OSError."""
        bits, start = as_integers(page), now()
        self._remove(slot)
        try:
            num_bytes = 0
            for head, name in enumerate(self._names(slot)):
                content = self.codec.encode(bits[:, :, head])
                replace_file(Path(name), content)
                num_bytes += memoryview(content).nbytes
        except OSError:
            self._remove(slot)
            raise
        self.meter.add("disk_write", start, num_bytes)
        if self._synced is not None:
            self._synced.add(self._names(slot))

    def _remove(self, slot: int) -> None:
        for name in self._names(slot):
            Path(name).unlink(missing_ok=True)

    def _names(self, slot: int) -> list[str]:
        return [f"{self._array}/{chunk_name(slot, head)}" for head in self._held]

    def _split(self, layer_slice: memoryview) -> Parts:
        half = len(layer_slice) // 2
        size = half // self.spec.num_kv_heads
        return [
            [layer_slice[first : first + size], layer_slice[half + first : half + first + size]]
            for first in range(0, half, size)
        ]

    def _sweep(self, kept: Container[int]) -> Iterator[tuple[int, int]]:
        """Removes the files of slots that are not kept; gives slot and head of each other chunk of a size that can be
        right."""
        recent = time.time() - WRITE_BACK_SECONDS
        try:
            with os.scandir(self._array) as files:
                for file in files:
                    chunk = parse_chunk(file.name)
                    is_partial = file.name.endswith(".partial")
                    if chunk is None:  # the metadata
                        swept = is_partial and self._held.start == 0
                    elif chunk[1] not in self._held:
                        continue
                    elif chunk[0] in kept and not is_partial:
                        swept = False
                        with suppress(FileNotFoundError, FileDamage):
                            found = file.stat()
                            self.codec.check_size(found.st_size)
                            if self._synced is not None and found.st_mtime > recent:
                                self._synced.add([file.path])
                            yield chunk
                    else:
                        swept = True
                    if swept and self._heads.writes:
                        Path(file.path).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._array} cannot be swept: {error.strerror}") from error


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor; a part of it costs less than a part of the tensor."""
    assert x.is_contiguous()
    return as_integers(x).reshape(-1).view(np.uint8).data
