"""The Zarr array of a cache folder, plain for whoever opens it.

Zarr v3 `[slot, layer, 2, kv_head, page_size, head_dim]` over the model's KV heads, no compressor, no filter; a chunk is
one KV head of a page, over all layers. bfloat16 is stored as uint16, since Zarr has no such type.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
import zarr
from zarr.storage import LocalStore

from distkv.storage.disk.cache_folder import ARRAY, FORMAT, remove_catalogue, replace_file
from distkv.storage.errors import ConfigError, StoreError
from distkv.storage.page_spec import PageSpec

log = logging.getLogger(__name__)

METADATA = "zarr.json"  # in the array's folder
STORED_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "uint16"}


def make_array(folder: Path, spec: PageSpec, num_pages: int) -> None:
    """Makes an empty array for pages of the whole model, and sweeps away what an earlier process left.

    Raises ConfigError when something else lies in its place, StoreError when it cannot be written.
    """
    remove_array(folder)
    try:
        zarr.create_array(
            store=LocalStore(folder / ARRAY),
            shape=(num_pages, *spec.page_shape),
            chunks=_chunks(spec),
            dtype=STORED_DTYPES[spec.dtype],
            compressors=None,
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},  # one flat folder
            dimension_names=("slot", "layer", "kv", "kv_head", "token", "head_dim"),
            attributes={"distkv": FORMAT, "dtype": dtype_name(spec.dtype)},
        )
    except OSError as error:
        raise StoreError(f"the array in cache_dir {str(folder)!r} cannot be made: {error}") from error


def has_array(folder: Path) -> bool:
    """Whether the folder has an array; one that was killed while it was made is none."""
    return (folder / ARRAY / METADATA).exists()


def find_slots(folder: Path, spec: PageSpec) -> int:
    """The number of slots of an array for pages of the whole model. Raises ConfigError when it is for others."""
    try:
        array = zarr.open_array(LocalStore(folder / ARRAY), mode="r")
        found = array.attrs.get("distkv"), array.attrs.get("dtype"), array.shape[1:], array.chunks
    except Exception as error:  # zarr has no common base of what it raises
        raise ConfigError(
            f"{str(folder / ARRAY)!r} cannot be opened ({error}); remove it or name another cache_dir"
        ) from error
    if found != (FORMAT, dtype_name(spec.dtype), spec.page_shape, _chunks(spec)):
        raise ConfigError(
            f"{str(folder / ARRAY)!r} does not hold {dtype_name(spec.dtype)} pages of shape {list(spec.page_shape)} in "
            f"format {FORMAT}; remove it or name another cache_dir"
        )
    return array.shape[0]


def fit_array(folder: Path, spec: PageSpec, num_pages: int) -> None:
    """Makes an array, or gives the one found another number of slots and leaves its chunks.

    Raises ConfigError when something else lies there, StoreError when it cannot be written.
    """
    if not has_array(folder):
        make_array(folder, spec, num_pages)
        return
    if find_slots(folder, spec) == num_pages:
        return
    path = folder / ARRAY / METADATA
    metadata = json.loads(path.read_bytes())
    metadata["shape"][0] = num_pages
    try:
        replace_file(path, json.dumps(metadata, indent=2).encode())
    except OSError as error:
        raise StoreError(f"the array in cache_dir {str(folder)!r} cannot be resized: {error.strerror}") from error


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
        remove_catalogue(folder)  # first, so that it never lists what is gone
        for path in left:  # the metadata goes last: a process killed meanwhile leaves an array that is known as ours
            path.unlink(missing_ok=True)
        shutil.rmtree(array)
    remove_catalogue(folder)


def dtype_name(dtype: torch.dtype) -> str:
    """As options spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _chunks(spec: PageSpec) -> tuple[int, ...]:
    return 1, spec.num_layers, 2, 1, spec.page_size, spec.head_dim
