"""The folder of one model's pages on disk: what lies in it under which name, who uses it, and whose pages they are.

lock               names the process that uses the folder, and is locked by it
kv.zarr            the pages, see `disk_array.py`; with a pipeline kv.layers-0-15.zarr and so on
catalogue.sqlite   which slots hold a page, and of which tokens, see `catalogue.py`
model.json         which model's they are, where the pages outlive the process, see `Description`
*.damaged          what could not be read, see `set_aside`

All of it can be made again, so what is damaged stops no engine: it is set aside. The folder is a sub-folder of the
user's cache_dir, named after the model's fingerprint, or SCRATCH for pages that are dropped when the engine closes.
"""

import errno
import logging
import time
from pathlib import Path
from typing import Annotated

import msgspec

from distkv.storage.disk.file_lock import FileLock, HeldError
from distkv.storage.disk.files import replace_file, sync_folder
from distkv.storage.disk.page_arrays import PageArray
from distkv.storage.errors import ConfigError, StoreError
from distkv.storage.page_spec import PageSpec

log = logging.getLogger(__name__)

FORMAT = 2  # of what lies on disk; part of the fingerprint
CATALOGUE, LOCK, DESCRIPTION = "catalogue.sqlite", "lock", "model.json"
CATALOGUE_LOG = f"{CATALOGUE}-wal"  # of commits that are not in it yet
SCRATCH, SESSIONS = "scratch", "sessions"  # sub-folders of cache_dir that are no model's
SWEEPER = "sweep-"  # begins the nonce of whoever has a folder's lock to sweep it, and for as long as that takes alone
FULL = errno.ENOSPC, errno.EDQUOT  # of a disk
DAMAGED = ".damaged"  # behind the name of what is set aside

Count = Annotated[int, msgspec.Meta(gt=0)]


class DamagedError(StoreError):
    """A file of the folder is not what distkv wrote there, or no more."""


class Description(msgspec.Struct, frozen=True):
    """What `model.json` says of the pages in a folder."""

    fingerprint: str
    model: str  # path of the model's folder when the cache was made
    dtype: str
    page_size: Count  # tokens, of each part
    num_layers: Count
    num_kv_heads: Count
    head_dim: Count
    page_bytes: Count  # on disk, at most
    disk_codec: Annotated[str, msgspec.Meta(pattern="^(none|lossless)$")] = "none"  # one of `DISK_CODECS`
    kv_cache_dtype: Annotated[str, msgspec.Meta(pattern="^(auto|fp8_e4m3|int8|int4)$")] = "auto"
    decode_context_parallel_size: Count = 1  # parts of a page, see `DiskShare`
    kernels: str = ""  # by which the pages were computed
    created: float = msgspec.field(default_factory=time.time)  # unix seconds

    @property
    def spec(self) -> PageSpec:
        """The pages of the whole model, of one part."""
        return PageSpec(
            self.num_layers, self.num_kv_heads, self.page_size, self.head_dim, self.dtype, self.kv_cache_dtype,
            self.disk_codec,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """Of a page, over all its parts."""
        return self.page_size * self.decode_context_parallel_size

    @property
    def num_files(self) -> int:
        """Of a page, where one array has all of its layers."""
        return self.num_kv_heads * self.decode_context_parallel_size

    @property
    def whole_array(self) -> PageArray:
        """The array of all layers."""
        return PageArray(None, self.decode_context_parallel_size)


class InUseError(ConfigError):
    """Another process uses a folder."""

    def __init__(self, message: str, owner: str = ""):
        """
        Args:
            owner: the other's nonce.
        """
        super().__init__(message)
        self.owner = owner


class FolderLock(FileLock):
    """The right to use a cache folder."""

    def __init__(self, folder: Path, owner: str = ""):
        """Makes the folder if need be.

        Args:
            owner: see `FileLock`.

        Raises ConfigError when it cannot be used, InUseError when another process uses it.
        """
        try:
            super().__init__(folder / LOCK, owner)
        except OSError as error:
            raise ConfigError(
                f"cache_dir {str(folder)!r} cannot be used ({error.strerror}); name a folder that can be written"
            ) from error
        except HeldError as holder:
            raise InUseError(
                f"cache_dir {str(folder)!r} is in use by {holder}; end that, or name another folder", holder.owner
            ) from None


def read_description(folder: Path) -> Description | None:
    """What lies in a folder; None when nothing says so. Raises DamagedError when that is no description, ConfigError
    when it cannot be read."""
    path = folder / DESCRIPTION
    try:
        return msgspec.json.decode(path.read_bytes(), type=Description)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise DamagedError(f"{str(path)!r} does not describe KV pages ({error})") from error
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror}); name another cache_dir") from error


def describe(folder: Path, description: Description) -> None:
    """Writes down whose pages a folder holds, once. A description that is damaged, or is of another model than the
    folder's name, is set aside: keys begin with the fingerprint, so no page can be taken for another model's. Raises
    StoreError when it cannot be written."""
    path = folder / DESCRIPTION
    try:
        found = read_description(folder)
        if found is not None and found.fingerprint != description.fingerprint:
            raise DamagedError(f"{str(path)!r} speaks of another model, {found.model!r}, than the name of its folder")
    except DamagedError as error:
        set_aside(path, error)
        found = None
    if found is None:
        _tell_of_other_parts(folder, description)
        try:
            replace_file(path, msgspec.json.format(msgspec.json.encode(description)), syncs=True)
        except OSError as error:
            raise StoreError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def _tell_of_other_parts(folder: Path, own: Description) -> None:
    """Warns that pages of the same model lie beside a new folder, where other numbers of ranks have shared out each."""
    for path in sorted(folder.parent.glob(f"*/{DESCRIPTION}")):
        try:
            found = read_description(path.parent)
        except (DamagedError, ConfigError):  # it says nothing of this model
            continue
        num_parts = own.decode_context_parallel_size
        if found is None or found.decode_context_parallel_size == num_parts:
            continue
        layout = {name: getattr(own, name) for name in ("fingerprint", "page_size", "page_bytes", "created")}
        if msgspec.structs.replace(found, **layout, decode_context_parallel_size=num_parts) == own:
            log.warning(
                "KV pages of this model in %s are not used: they were written with decode_context_parallel_size %d and "
                "page_size %d, and only the same are found again; prompts are computed anew",
                path.parent, found.decode_context_parallel_size, found.page_size,
            )  # fmt: skip
            return


def remove_catalogue(folder: Path) -> None:
    """Removes the catalogue for good, which is better than one that is not true. Raises StoreError when it cannot be
    removed."""
    files = [folder / f"{CATALOGUE}{end}" for end in ("", "-wal", "-shm", "-journal")]
    try:
        if found := [path for path in files if path.exists()]:
            for path in found:
                path.unlink(missing_ok=True)
            sync_folder(folder)
    except OSError as error:
        raise StoreError(f"the catalogue in {folder} cannot be removed: {error.strerror}") from error


def take_away(path: Path) -> None:
    """Removes a damaged file; a folder in its place is renamed, since nobody knows what it is. Raises StoreError."""
    try:
        if path.is_dir():
            path.replace(path.with_name(path.name + DAMAGED))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{str(path)!r} is damaged and cannot be removed: {error.strerror}") from error


def set_aside(path: Path, reason: object) -> None:
    """Renames what is damaged, with a warning, in place of what was set aside before. Raises StoreError when it cannot
    be renamed."""
    aside = path.with_name(path.name + DAMAGED)
    try:
        path.replace(aside)
    except OSError as error:
        raise StoreError(f"{reason}, and it cannot be renamed: {error.strerror}; remove it") from error
    log.warning("%s; it is renamed to %s and made again", reason, aside.name)
