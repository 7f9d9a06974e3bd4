"""The folder of the disk tier: who uses it, and its Zarr array.

cache_dir/lock               names the process that uses the folder, and is locked by it
cache_dir/kv.zarr            Zarr v3 array [slot, layer, 2, kv_head, page_size, head_dim], no compressor, no filter;
                             bfloat16 is stored as uint16, since Zarr has no such type
cache_dir/catalogue.sqlite   which slots hold a page, see `catalogue.py`
"""

import fcntl
import logging
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.storage import LocalStore

from distkv.errors import ConfigError, StoreError
from distkv.storage.page_spec import PageSpec

log = logging.getLogger(__name__)

FORMAT = 1
ARRAY, CATALOGUE, LOCK = "kv.zarr", "catalogue.sqlite", "lock"
METADATA = "zarr.json"  # in the array's folder
STORED_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "uint16"}


@dataclass(frozen=True)
class DiskHeads:
    """Which part of the array's KV heads is a rank's, and how many of them a chunk holds."""

    first: int
    total: int  # of all ranks; a head that several ranks hold counts for each
    per_chunk: int  # divides every rank's first head and its number of heads


class FolderLock:
    """The right to use a cache folder, held until `release` or the end of the process."""

    def __init__(self, folder: Path):
        """Makes the folder if need be. Raises ConfigError when it cannot be used or another process uses it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"cache_dir {str(folder)!r} cannot be used ({error.strerror}); name a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"cache_dir {str(folder)!r} is in use by {holder}; end that, or name another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets others use the folder."""
        self._file.close()


def make_array(folder: Path, spec: PageSpec, num_pages: int, heads: DiskHeads) -> None:
    """Makes an empty array, and sweeps away what an earlier process left.

    Raises ConfigError when something else lies in its place, StoreError when it cannot be written.
    """
    remove_array(folder)
    try:
        zarr.create_array(
            store=LocalStore(folder / ARRAY),
            shape=_shape(spec, num_pages, heads),
            chunks=_chunks(spec, heads),
            dtype=STORED_DTYPES[spec.dtype],
            compressors=None,
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},  # one flat folder
            dimension_names=("slot", "layer", "kv", "kv_head", "token", "head_dim"),
            attributes={"distkv": FORMAT, "dtype": _name(spec.dtype)},
        )
    except OSError as error:
        raise StoreError(f"the array in cache_dir {str(folder)!r} cannot be made: {error}") from error


def matches(folder: Path, spec: PageSpec, num_pages: int, heads: DiskHeads) -> bool:
    """Whether the folder has an array of this shape and type."""
    if not (folder / ARRAY / METADATA).exists():
        return False
    array = open_array(folder)
    if array.attrs.get("dtype") != _name(spec.dtype):
        return False
    return array.shape == _shape(spec, num_pages, heads) and array.chunks == _chunks(spec, heads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(spec: PageSpec, num_pages: int, heads: DiskHeads) -> tuple[int, ...]:
    return num_pages, spec.num_layers, 2, heads.total, spec.page_size, spec.head_dim


def _chunks(spec: PageSpec, heads: DiskHeads) -> tuple[int, ...]:
    return 1, spec.num_layers, 2, heads.per_chunk, spec.page_size, spec.head_dim


def open_array(folder: Path) -> Any:
    """The array, for writing whole chunks."""
    # open_array's own argument for it is without effect on an array that exists: zarr-python issue 2931
    with zarr.config.set({"array.write_empty_chunks": True}):
        return zarr.open_array(LocalStore(folder / ARRAY), mode="r+")


def remove_array(folder: Path) -> None:
    """Deletes the array with all its pages, and the catalogue. Raises ConfigError when it is not distkv's."""
    array = folder / ARRAY
    if array.exists():
        try:
            ours = zarr.open_array(LocalStore(array), mode="r").attrs.get("distkv") is not None
        except Exception:  # zarr has no common base of what it raises
            # killed before it wrote the metadata, or while it swept
            ours = array.is_dir() and all(
                path.suffix == ".partial" or path.name.startswith("c.") for path in array.iterdir()
            )
        if not ours:
            raise ConfigError(f"{str(array)!r} was not made by distkv; name another cache_dir")
        left = [path for path in array.iterdir() if path.name != METADATA]
        if left:
            log.info("removing %d files that an earlier process left in %s", len(left), array)
        for path in folder.glob(f"{CATALOGUE}*"):  # first, so that it never lists what is gone
            path.unlink()
        for path in left:  # the metadata goes last: a process killed meanwhile leaves an array that is known as ours
            path.unlink(missing_ok=True)
        shutil.rmtree(array)
