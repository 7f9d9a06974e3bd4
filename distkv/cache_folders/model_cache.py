"""The pages of a model in a cache_dir: which there are, whether they are whole, and how some are taken out."""

import os
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from crc32c import crc32c

from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import (
    ARRAY,
    CATALOGUE,
    SCRATCH,
    SESSIONS,
    chunk_name,
    parse_chunk,
    read_description,
)
from distkv.storage.disk.catalogue import Catalogue, Entry


class ModelCache:
    """The pages of one model, in a sub-folder of cache_dir."""

    def __init__(self, folder: Path):
        """Raises ConfigError when the folder is no model's."""
        found = read_description(folder)
        if found is None:
            raise ConfigError(f"{str(folder)!r} holds no KV pages")
        self.folder, self.description = folder, found

    @property
    def name(self) -> str:
        return f"{self.description.model} ({self.folder.name})"

    def entries(self) -> list[Entry]:
        """See `Catalogue.entries`; an engine may be using the folder."""
        if not (self.folder / CATALOGUE).exists():
            return []
        with closing(Catalogue(self.folder, read_only=True)) as catalogue:
            return catalogue.entries()

    def num_bytes(self) -> int:
        """Bytes of the array's files; the catalogue is small beside them, and has helpers that come and go."""
        total = 0
        for path in (self.folder / ARRAY).glob("*"):
            with suppress(FileNotFoundError):  # an engine replaces it
                total += path.stat().st_size
        return total

    def damage(self, entry: Entry) -> str | None:
        """What is wrong with the files of a page, naming the first such file; None when they are whole."""
        shape = self.description.num_kv_heads, self.description.num_layers
        checksums = np.frombuffer(entry.crc32c, np.uint32)
        if checksums.size != shape[0] * shape[1]:
            return (
                f"the catalogue has {checksums.size} checksums for slot {entry.slot}, and {shape[0] * shape[1]} are due"
            )
        size = self.description.page_bytes // shape[0]
        memory = memoryview(bytearray(size + 1))  # one more, so that too long a file is noticed
        for head, expected in enumerate(checksums.reshape(shape).tolist()):
            path = self.folder / ARRAY / chunk_name(entry.slot, head)
            try:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    count = os.preadv(descriptor, [memory], 0)
                finally:
                    os.close(descriptor)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}"
            if count != size:
                return f"{path} has not the {size} bytes of a page's head"
            step = size // shape[1]
            for layer, checksum in enumerate(expected):
                if crc32c(memory[layer * step : (layer + 1) * step]) != checksum:
                    return f"{path} is damaged: the checksum of layer {layer} is wrong"
        return None

    def remove(self, slots: set[int]) -> None:
        """Takes pages out; the folder must be locked."""
        with closing(Catalogue(self.folder)) as catalogue:
            catalogue.update(slots, [])
        for slot in slots:
            for head in range(self.description.num_kv_heads):
                (self.folder / ARRAY / chunk_name(slot, head)).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes the files of pages that are not listed; the folder must be locked."""
        listed = {entry.slot for entry in self.entries()}
        for path in (self.folder / ARRAY).glob("c.*"):
            chunk = parse_chunk(path.name)
            if chunk is not None and (chunk[0] not in listed or path.suffix == ".partial"):
                path.unlink(missing_ok=True)


def find_caches(cache_dir: Path) -> list[ModelCache]:
    """The models of which pages lie in a cache_dir; raises ConfigError when it is none."""
    if not cache_dir.is_dir():
        raise ConfigError(f"cache_dir {str(cache_dir)!r} is no folder; name the cache_dir of an engine")
    if read_description(cache_dir) is not None:
        raise ConfigError(f"{str(cache_dir)!r} is one model's part of a cache; name the folder above it")
    folders = sorted(path for path in cache_dir.iterdir() if path.name not in (SCRATCH, SESSIONS))
    caches = [ModelCache(folder) for folder in folders if read_description(folder) is not None]
    if folders and not caches and not any((cache_dir / name).is_dir() for name in (SCRATCH, SESSIONS)):
        raise ConfigError(f"{str(cache_dir)!r} is not a cache of KV pages; name the cache_dir of an engine")
    return caches
