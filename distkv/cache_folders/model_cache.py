"""The pages of a model in a cache_dir: which there are, and whether they are whole."""

import os
from contextlib import closing
from pathlib import Path

import numpy as np

from distkv.cache_folders.stored_heads import StoredHeads
from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import (
    CATALOGUE,
    DESCRIPTION,
    SCRATCH,
    SESSIONS,
    DamagedError,
    Description,
    read_description,
)
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.disk.page_arrays import PageArray, find_arrays
from distkv.storage.page_spec import PageSpec


class ModelCache:
    """The pages of one model, in a sub-folder of cache_dir."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._description: Description | None = None
        self._problem = f"{str(folder)!r} has no {DESCRIPTION}"
        self.problem: str | None = None  # what is wrong with the description, which may be missing
        try:
            self._description = read_description(folder)
        except (DamagedError, ConfigError) as error:
            self._problem = self.problem = str(error)

    @property
    def description(self) -> Description:
        """Raises DamagedError when it is not known."""
        if self._description is None:
            raise DamagedError(self._problem)
        return self._description

    @property
    def spec(self) -> PageSpec | None:
        """The pages of the whole model, where it is known what they are."""
        return None if self._description is None else self._description.spec

    @property
    def is_listed_elsewhere(self) -> bool:
        """Whether the leader, and with it the catalogue, is on another node, so that only an engine knows which files
        are of use."""
        return not any(os.path.lexists(self.folder / name) for name in (CATALOGUE, DESCRIPTION))

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

    def listed(self) -> set[int]:
        """See `Catalogue.slots`. Raises DamagedError or StoreError."""
        with closing(Catalogue(self.folder, read_only=True)) as catalogue:
            return catalogue.slots()

    def unreachable(self) -> set[int]:
        """The slots of pages that are listed and of no use, since one before them is not listed. Raises DamagedError or
        StoreError."""
        with closing(Catalogue(self.folder, read_only=True)) as catalogue:
            return catalogue.slots() - {entry.slot for entry in catalogue.entries()}

    @property
    def arrays(self) -> list[PageArray]:
        """Those in which its pages lie, one for each stage of a pipeline."""
        num_parts = 1 if self._description is None else self._description.decode_context_parallel_size
        return find_arrays(self.folder, num_parts)

    @property
    def stored(self) -> StoredHeads:
        """The files of its pages."""
        return StoredHeads(self.folder, self._description)

    def check_catalogue(self) -> None:
        """Raises DamagedError when it is damaged, be it where no row is, StoreError when it cannot be read now."""
        with closing(Catalogue(self.folder, read_only=True)) as catalogue:
            catalogue.check()

    def damage(self, entry: Entry, stored: StoredHeads, of_all: bool) -> str | None:
        """What is wrong with the files of a page, naming the first such file; None when they are whole.

        Args:
            stored, of_all: see `StoredHeads.damage`.
        """
        heads = stored.of(entry.slot)
        num_layers, rest = divmod(len(entry.crc32c), 4 * len(heads)) if heads else (0, 0)
        if not num_layers or rest or (self._description and num_layers != self._description.num_layers):
            return f"slot {entry.slot} has {len(entry.crc32c)} bytes of checksums, and not those of {len(heads)} files"
        checksums = np.frombuffer(entry.crc32c, np.uint32).reshape(len(heads), num_layers)
        found = (
            stored.damage(head, expected, of_all) for head, expected in zip(heads, checksums.tolist(), strict=True)
        )
        return next((problem for problem in found if problem), None)


def elsewhere(cache: ModelCache) -> str:
    """Says of one that `is_listed_elsewhere` why it stays as it is."""
    return f"{str(cache.folder)!r} stays as it is: its pages are listed on another node, where the engine's leader was"


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


def find_cache(cache_dir: Path, fingerprint: str | None) -> ModelCache:
    """The model of which pages lie in a cache_dir. Raises ConfigError as `find_caches` does, and when there is none, or
    more than one and the first digits of a fingerprint do not tell which."""
    caches = find_caches(cache_dir)
    found = [cache for cache in caches if cache.fingerprint.startswith(fingerprint or "")]
    if len(found) != 1:
        known = ", ".join(cache.folder.name for cache in caches) or "none"
        if fingerprint is None:
            raise ConfigError(
                f"{str(cache_dir)!r} has pages of {len(found)} models; name one by its fingerprint: {known}"
            )
        raise ConfigError(
            f"{len(found)} models have a fingerprint that begins with {fingerprint!r}; there are: {known}"
        )
    return found[0]


def _holds_pages(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in (DESCRIPTION, CATALOGUE)) or bool(find_arrays(folder))
