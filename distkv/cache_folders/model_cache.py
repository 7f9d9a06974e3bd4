"""The pages of a model in a cache_dir: which there are, and whether they are whole."""

import os
from contextlib import closing
from pathlib import Path

import numpy as np
from crc32c import crc32c

from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import (
    ARRAY,
    CATALOGUE,
    DESCRIPTION,
    SCRATCH,
    SESSIONS,
    DamagedError,
    Description,
    chunk_name,
    read_description,
)
from distkv.storage.disk.catalogue import Catalogue, Entry


class ModelCache:
    """The pages of one model, in a sub-folder of cache_dir."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._description, self._problem = None, f"{str(folder)!r} has no {DESCRIPTION}"
        try:
            self._description = read_description(folder)
        except (DamagedError, ConfigError) as error:
            self._problem = str(error)

    @property
    def description(self) -> Description:
        """Raises DamagedError when it is not known."""
        if self._description is None:
            raise DamagedError(self._problem)
        return self._description

    @property
    def fingerprint(self) -> str:
        """As much of it as is known."""
        return self.folder.name if self._description is None else self._description.fingerprint

    @property
    def model(self) -> str:
        """Path of the model's folder when the cache was made."""
        return "?" if self._description is None else self._description.model

    @property
    def name(self) -> str:
        return f"{self.model} ({self.folder.name})"

    def entries(self) -> list[Entry]:
        """See `Catalogue.entries`; an engine may be using the folder. Raises DamagedError or StoreError."""
        with closing(Catalogue(self.folder, read_only=True)) as catalogue:
            return catalogue.entries()

    def damage(self, entry: Entry) -> str | None:
        """What is wrong with the files of a page, naming the first such file; None when they are whole. Raises
        DamagedError when it is not known what they hold."""
        shape = self.description.num_kv_heads, self.description.num_layers
        if len(entry.crc32c) != 4 * shape[0] * shape[1]:
            return (
                f"the catalogue has {len(entry.crc32c)} bytes of checksums for slot {entry.slot}, and "
                f"{4 * shape[0] * shape[1]} are due"
            )
        checksums = np.frombuffer(entry.crc32c, np.uint32)
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


def find_caches(cache_dir: Path) -> list[ModelCache]:
    """The models of which pages lie in a cache_dir; raises ConfigError when it is none."""
    if not cache_dir.is_dir():
        raise ConfigError(f"cache_dir {str(cache_dir)!r} is no folder; name the cache_dir of an engine")
    if _holds_pages(cache_dir):
        raise ConfigError(f"{str(cache_dir)!r} is one model's part of a cache; name the folder above it")
    folders = sorted(path for path in cache_dir.iterdir() if path.name not in (SCRATCH, SESSIONS))
    caches = [ModelCache(folder) for folder in folders if _holds_pages(folder)]
    if folders and not caches and not any((cache_dir / name).is_dir() for name in (SCRATCH, SESSIONS)):
        raise ConfigError(f"{str(cache_dir)!r} is not a cache of KV pages; name the cache_dir of an engine")
    return caches


def _holds_pages(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in (DESCRIPTION, ARRAY, CATALOGUE))
