"""The Zarr arrays of a cache folder, plain for whoever opens them; most have one, see `page_arrays.py`.

Zarr v3 `[slot, layer, 2, kv_head, token, head_dim]` over the model's KV heads and the layers of the array. A file is
one KV head of a page, or of a part of its tokens, over all of these layers: a chunk without compressor or filter, or
else a shard, see `lossless_codec.py`. bfloat16 is stored as uint16, since Zarr has no such type.

`spec` is of the pages in the array, of all KV heads and of one part of the tokens.
"""

import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import Buffer
from zarr.core.common import JSON
from zarr.storage import LocalStore, MemoryStore

from distkv.kernels.codec_format import CodecFormat, group_size
from distkv.storage.disk.cache_folder import DAMAGED, FORMAT, DamagedError, remove_catalogue, set_aside, take_away
from distkv.storage.disk.files import make_folder, replace_file
from distkv.storage.disk.lossless_codec import COMPRESSOR, LEVEL
from distkv.storage.disk.page_arrays import WHOLE, PageArray, find_arrays, parse_chunk
from distkv.storage.errors import ConfigError, StoreError
from distkv.storage.page_spec import PageSpec

log = logging.getLogger(__name__)

METADATA = "zarr.json"  # in the array's folder
STORED_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "uint8": "uint8"}


class OtherPagesError(DamagedError):
    """The array is one of distkv's, and not for these pages."""


def make_array(folder: Path, spec: PageSpec, num_pages: int, array: PageArray = WHOLE) -> None:
    """Makes an empty array, and sweeps away what an earlier process left in its place.

    Raises ConfigError when something else lies there, StoreError when it cannot be written.
    """
    remove_array(folder, array)
    _write_metadata(folder, spec, num_pages, array)


def has_array(folder: Path, array: PageArray = WHOLE) -> bool:
    """Whether the folder has an array; one that was killed while it was made is none."""
    return (folder / array.name / METADATA).exists()


def find_slots(folder: Path, spec: PageSpec, array: PageArray = WHOLE) -> int:
    """The number of slots of an array. Raises ConfigError when it was not made by distkv, OtherPagesError when its
    metadata are those of other pages, and else DamagedError when they are not what they were."""
    path = folder / array.name
    if _made_by_distkv(path) is False:
        raise _foreign(path)
    try:
        found = zarr.open_array(LocalStore(path), mode="r")
        attributes = {name: found.attrs.get(name) for name in ("distkv", "dtype", "codec")}
        expected = page_array(MemoryStore(), spec, found.shape[0], array).metadata
    except Exception as error:  # zarr has no common base of what it raises
        raise DamagedError(f"the metadata of {str(path)!r} cannot be read ({error})") from error
    codec = None if spec.format is None else spec.format.name
    is_other = attributes != {"distkv": FORMAT, "dtype": spec.dtype, "codec": codec}
    if is_other or (found.shape, found.chunks) != (expected.shape, expected.chunks):
        raise OtherPagesError(
            f"{str(path)!r} does not hold {codec or spec.dtype} pages of shape {list(expected.shape[1:])} in format "
            f"{FORMAT}, and what it holds is given up"
        )
    if found.metadata.to_dict() != expected.to_dict():
        raise DamagedError(f"the metadata of {str(path)!r} are not what they were")
    return found.shape[0]


def check_metadata(folder: Path, spec: PageSpec | None, array: PageArray = WHOLE) -> None:
    """Raises DamagedError when those of an array are damaged or lost, ConfigError when it was not made by distkv.

    Args:
        spec: None where the pages are not known.
    """
    path = folder / array.name
    if not path.exists():
        return
    if not path.is_dir():
        raise _foreign(path)
    if spec is not None and not has_array(folder, array):
        raise DamagedError(f"{str(path)!r} has no {METADATA}")
    if spec is not None:
        find_slots(folder, spec, array)
    elif has_array(folder, array) and _made_by_distkv(path) is None:
        raise DamagedError(f"the metadata of {str(path)!r} cannot be read")


def renew_metadata(folder: Path, spec: PageSpec | None, num_pages: int, array: PageArray = WHOLE) -> None:
    """Makes those of an array again, or removes them where its pages are not known, so that an engine makes them."""
    take_away(folder / array.name / METADATA)
    if spec is not None:
        _write_metadata(folder, spec, num_pages, array)


def mend_array(folder: Path, spec: PageSpec, num_pages: int, array: PageArray = WHOLE) -> None:
    """Makes metadata of an array that are damaged or lost again. The pages in it stay, since they are checked when they
    are taken over, unless they are other ones.

    Raises ConfigError when the array was not made by distkv, StoreError when it cannot be written.
    """
    path = folder / array.name
    if path.exists() and not has_array(folder, array):
        if not _is_named_as_ours(path):
            raise _foreign(path)
        _write_metadata(folder, spec, num_pages, array)
    elif has_array(folder, array):
        try:
            find_slots(folder, spec, array)
        except DamagedError as error:
            if isinstance(error, OtherPagesError):
                remove_catalogue(folder)
            set_aside(path / METADATA, error)
            _write_metadata(folder, spec, num_pages, array)


def fit_array(folder: Path, spec: PageSpec, num_pages: int, array: PageArray = WHOLE) -> None:
    """Makes an array, or gives the one found, see `mend_array`, another number of slots and leaves its chunks.

    Raises ConfigError when something else lies there, StoreError when it cannot be written.
    """
    if not has_array(folder, array):
        if not find_arrays(folder):
            remove_catalogue(folder)
        _write_metadata(folder, spec, num_pages, array)
        return
    if find_slots(folder, spec, array) == num_pages:
        return
    path = folder / array.name / METADATA
    metadata = json.loads(path.read_bytes())
    metadata["shape"][0] = num_pages
    try:
        replace_file(path, json.dumps(metadata, indent=2).encode(), syncs=True)
    except OSError as error:
        raise StoreError(
            f"the array in cache_dir {str(folder)!r} cannot be resized ({error.strerror}); make room on the disk, or "
            "leave disk_kv_bytes as it was"
        ) from error


def remove_arrays(folder: Path) -> None:
    """Deletes all arrays of a folder, with the catalogue. Raises as `remove_array` does."""
    try:
        arrays = find_arrays(folder)
    except OSError as error:
        raise StoreError(f"{str(folder)!r} cannot be read: {error.strerror}") from error
    for array in arrays:
        remove_array(folder, array)
    remove_catalogue(folder)


def remove_array(folder: Path, array: PageArray = WHOLE) -> None:
    """Deletes an array with all its pages, and the catalogue. Raises ConfigError when it is not distkv's, StoreError
    when it cannot be deleted."""
    path = folder / array.name
    try:
        if path.exists():
            ours = _made_by_distkv(path)
            if ours is None:  # killed before it wrote the metadata, or while it swept; or they are damaged
                ours = _is_named_as_ours(path)
            if not ours:
                raise _foreign(path)
            left = [file for file in path.iterdir() if file.name != METADATA]
            if left:
                log.info("removing %d files that an earlier process left in %s", len(left), path)
            remove_catalogue(folder)  # first, so that it never lists what is gone
            for file in left:  # the metadata goes last: a process killed meanwhile leaves an array known as ours
                file.unlink(missing_ok=True)
            shutil.rmtree(path)
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be removed: {error.strerror}") from error
    remove_catalogue(folder)


def drop_arrays(folder: Path, stages: Collection[tuple[int, int]], num_layers: int) -> None:
    """Removes the arrays of a locked folder that have no page, or none of the layers of some stages: those who need
    others have a folder of their own. Raises StoreError when they cannot be removed."""
    try:
        for array in find_arrays(folder):
            path, is_used = folder / array.name, any(array.overlaps(stage, num_layers) for stage in stages)
            if array.range(num_layers) in stages or not (has_array(folder, array) and _is_named_as_ours(path)):
                continue
            if not is_used or not any(parse_chunk(file.name) for file in path.iterdir()):
                log.info("removing %s: its pages are of no use to the ranks on this disk", path)
                for file in path.glob("c.*"):  # the metadata go last
                    file.unlink(missing_ok=True)
                shutil.rmtree(path)
    except OSError as error:
        raise StoreError(f"arrays in {str(folder)!r} cannot be removed: {error.strerror}") from error


def _write_metadata(folder: Path, spec: PageSpec, num_pages: int, array: PageArray) -> None:
    content: dict[str, Buffer] = {}
    page_array(MemoryStore(content), spec, num_pages, array)
    try:
        make_folder(folder / array.name)
        replace_file(folder / array.name / METADATA, content[METADATA].to_bytes(), syncs=True)
    except OSError as error:
        raise StoreError(f"the array in cache_dir {str(folder)!r} cannot be made: {error}") from error


def page_array(store: Store, spec: PageSpec, num_pages: int, array: PageArray = WHOLE, name: str | None = None) -> Any:
    """Makes an array without pages, the store's only one or one of a name."""
    dtype = STORED_DTYPES[spec.stored_dtype]
    num_layers, pair, heads, tokens, row = spec.page_shape
    layers = {} if array.layers is None else {"layers": list(array.layers)}
    return zarr.create_array(
        store=store,
        name=name,
        shape=(num_pages, num_layers, pair, heads, tokens * array.num_parts, row),
        dtype=dtype,
        **_stored_as(spec, np.dtype(dtype).itemsize),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},  # one flat folder
        dimension_names=("slot", "layer", "kv", "kv_head", "token", "head_dim" if spec.format is None else "byte"),
        attributes={"distkv": FORMAT, "dtype": spec.dtype, **layers, **_codec_attributes(spec)},
    )


def _stored_as(spec: PageSpec, item_bytes: int) -> dict[str, Any]:
    """What Zarr has to know of the files."""
    rows = spec.page_shape[-2:]
    head = 1, spec.num_layers, 2, 1, *rows
    if spec.disk_codec == "none":
        return {"chunks": head, "compressors": None, "filters": None}
    return {
        "shards": {"shape": head, "index_location": "start"},
        "chunks": (1, 1, 1, 1, *rows),
        "filters": [TransposeCodec(order=(0, 1, 2, 3, 5, 4))],
        "compressors": [
            BloscCodec(typesize=item_bytes, cname=COMPRESSOR, clevel=LEVEL, shuffle="bitshuffle", blocksize=0),
            Crc32cCodec(),
        ],
    }


def _codec_attributes(spec: PageSpec) -> dict[str, JSON]:
    """Enough to read pages of codes without distkv."""
    if spec.format is None:
        return {}
    group = group_size(spec.page_size, spec.head_dim)
    return {
        "codec": spec.format.name,
        "head_dim": spec.head_dim,
        "group": group,
        "num_scales": spec.format.num_scales,
        "formula": spec.format.formula,
        "layout": " ".join(str(CodecFormat.__doc__).split()),
    }


def _made_by_distkv(path: Path) -> bool | None:
    """What the metadata of a Zarr array or group say of its maker; None when there are none, or damaged ones. Raises
    StoreError when they cannot be read."""
    try:
        metadata = json.loads((path / METADATA).read_bytes())
        return metadata["attributes"].get("distkv") is not None if "zarr_format" in metadata else None
    except KeyError:
        return False
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{str(path / METADATA)!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _is_named_as_ours(path: Path) -> bool:
    return path.is_dir() and all(map(_is_named_by_distkv, path.iterdir()))


def _is_named_by_distkv(path: Path) -> bool:
    return path.suffix == ".partial" or path.name in (METADATA, METADATA + DAMAGED) or bool(parse_chunk(path.name))


def _foreign(path: Path) -> ConfigError:
    return ConfigError(f"{str(path)!r} was not made by distkv; name another cache_dir")
