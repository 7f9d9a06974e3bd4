"""The disk tier: one rank's part of the Zarr arrays, whose files are written and read here, each by a `FileCodec`.

A file is written to a temporary file and renamed, so a killed write leaves no torn one. zarr itself reads a missing
chunk as zeros and a damaged one without a word, at a third of the speed, and when the disk takes one head of a page no
more it does not say when its writes of the others have ended.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from distkv.storage.disk.cache_folder import FULL
from distkv.storage.disk.disk_codec import disk_codec
from distkv.storage.disk.file_codec import ChecksumDamage, FileDamage
from distkv.storage.disk.files import replace_file
from distkv.storage.disk.page_arrays import DiskShare, chunk_name
from distkv.storage.disk.page_finder import PageFinder, PieceFiles
from distkv.storage.disk.synced_pages import SyncedPages
from distkv.storage.errors import StoreError
from distkv.storage.meter import Meter, now
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.host_memory import as_integers
from distkv.storage.pools.open_pages import OpenPages, Parts, checksum
from distkv.storage.pools.page_pool import check_slot
from distkv.storage.tier import Tier


class DiskPool:
    """A `PagePool` over the KV heads of one rank; pages in different slots may be stored and loaded at the same time.

    The checksum of each head's layer slice is kept in memory; `checksums` gives those of a slot for the catalogue.
    """

    def __init__(
        self,
        spec: PageSpec,
        folder: Path,
        num_pages: int,
        share: DiskShare,
        meter: Meter | None = None,
        synced: SyncedPages | None = None,
    ):
        """For the arrays that lie in `folder`; its own has at least so many slots.

        Args:
            synced: takes care that pages outlive a loss of power.
        """
        self.meter = meter or Meter()
        self.num_pages = num_pages
        self.spec = spec
        self.codec = disk_codec(spec)
        self._share = share
        self._synced = synced
        self._held = range(*share.heads)
        self.folder = folder
        self.nbytes = num_pages * spec.page_bytes_in(Tier.DISK)
        self._array = str(folder / share.array.name)
        self._crcs = np.zeros((num_pages, spec.num_kv_heads, spec.num_layers), dtype=np.uint32)
        self._stored = np.zeros(num_pages, dtype=bool)
        self._elsewhere: dict[int, list[PieceFiles]] = {}  # by slot, pages that lie in arrays of other layouts
        self.lack = ""  # why `adopt` has not found all pages
        self._strays: dict[int, list[str]] = {}  # by slot, files of other layouts there
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
        self._elsewhere.pop(slot, None)
        if self._share.writes:
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
            entries: by slot the checksums of the whole model, uint32 `[part, kv_head, layer]` in C order.

        Returns the slots of pages that this rank cannot read: a file is missing or has another size, or the checksums
        are not this model's. Files of other pages, and of writes that were cut off, are removed, see
        `PageFinder.sweep`. Raises StoreError when the folder cannot be read.
        """
        self._stored[:] = False
        finder = PageFinder(self.folder, self.spec, self._share)
        finder.sweep(entries, lambda files: None if self._synced is None else self._synced.add(files))
        missing = self._take_over(entries, finder)
        self.lack = finder.lack(missing) if missing else ""
        return missing

    def take_in(self, entries: dict[int, bytes]) -> list[int]:
        """Takes over pages that somebody else has put into free slots meanwhile, as `adopt` does, and removes nothing.
        Raises StoreError when the folder cannot be read."""
        finder = PageFinder(self.folder, self.spec, self._share)
        finder.look(entries)
        missing = self._take_over(entries, finder)
        if self._synced is not None:
            for slot in entries.keys() - set(missing):
                self._synced.add(file for piece in self.pieces(slot) for file in piece.files)
        return missing

    def parts(self, layer_slice: Tensor) -> Parts:
        """The memory of a contiguous layer slice `[2, kv_head, page_size, head_dim]`, to read into."""
        return self._split(_bytes(layer_slice))

    def checksums(self, slot: int) -> bytes:
        """This rank's part of a slot's entry in the catalogue: crc32c of each head's layer slice, uint32
        `[kv_head, layer]` in C order. Empty where an earlier rank has the same part."""
        return self._crcs[slot].tobytes() if self._share.reports else b""

    def chunk_path(self, slot: int, head: int) -> Path:
        """The file of one of this rank's heads, counted on the rank."""
        return Path(self.files(slot)[head])

    def close(self) -> None:
        """Syncs what is left. The files belong to the folder."""
        self.prefetch_thread.shutdown()
        if self._synced is not None:
            self._synced.close()

    def pieces(self, slot: int) -> list[PieceFiles]:
        """Where the page in a slot lies, by layers; most lie in this rank's own array alone."""
        check_slot(slot, self.num_pages)
        if not self._stored[slot]:
            raise StoreError(f"slot {slot} of {self._array} holds no page")
        found = self._elsewhere.get(slot) if self._elsewhere else None
        return found or [PieceFiles(self.spec.num_layers, 0, self._names(slot), self.codec)]

    def files(self, slot: int) -> list[str]:
        """The files of a slot, one for each head, or several where other layouts have written them."""
        return [file for piece in self.pieces(slot) for file in piece.files]

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

    def _take_over(self, entries: dict[int, bytes], finder: PageFinder) -> list[int]:
        """Notes the checksums of pages whose files are all found; returns the slots of others."""
        expected = self._share.empty_checksums()
        missing = []
        for slot, checksums in entries.items():
            pieces = finder.find(slot) if slot < self.num_pages and len(checksums) == expected.nbytes else None
            if pieces is None:
                missing.append(slot)
                continue
            self._crcs[slot] = self._share.own(np.frombuffer(checksums, np.uint32).reshape(expected.shape))
            self._stored[slot] = True
            if [piece.files for piece in pieces] != [self._names(slot)]:
                self._elsewhere[slot] = pieces
        self._strays |= finder.strays
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
        for name in self._names(slot) + self._strays.pop(slot, []):
            Path(name).unlink(missing_ok=True)

    def _names(self, slot: int) -> list[str]:
        return [f"{self._array}/{chunk_name(slot, head, self._share.part)}" for head in self._held]

    def _split(self, layer_slice: memoryview) -> Parts:
        half = len(layer_slice) // 2
        size = half // self.spec.num_kv_heads
        return [
            [layer_slice[first : first + size], layer_slice[half + first : half + first + size]]
            for first in range(0, half, size)
        ]


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor; a part of it costs less than a part of the tensor."""
    assert x.is_contiguous()
    return as_integers(x).reshape(-1).view(np.uint8).data
