"""The Zarr array of a cache folder, plain for whoever opens it.

Zarr v3 `[slot, layer, 2, kv_head, page_size, head_dim]` over the model's KV heads. A file is one KV head of a page,
over all layers: a chunk without compressor or filter, or else a shard, see `lossless_codec.py`. bfloat16 is stored as
uint16, since Zarr has no such type.
"""

import json
import logging
import shutil
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
from distkv.storage.disk.cache_folder import (
    ARRAY,
    DAMAGED,
    FORMAT,
    DamagedError,
    parse_chunk,
    remove_catalogue,
    set_aside,
    take_away,
)
from distkv.storage.disk.files import make_folder, replace_file
from distkv.storage.disk.lossless_codec import COMPRESSOR, LEVEL
from distkv.storage.errors import ConfigError, StoreError
from distkv.storage.page_spec import PageSpec

log = logging.getLogger(__name__)

METADATA = "zarr.json"  # in the array's folder
STORED_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "uint8": "uint8"}


class OtherPagesError(DamagedError):
    """The array is one of distkv's, and not for these pages."""


def make_array(folder: Path, spec: PageSpec, num_pages: int) -> None:
    """Makes an empty array for pages of the whole model, and sweeps away what an earlier process left.

    Raises ConfigError when something else lies in its place, StoreError when it cannot be written.
    """
    remove_array(folder)
    _write_metadata(folder, spec, num_pages)


def has_array(folder: Path) -> bool:
    """Whether the folder has an array; one that was killed while it was made is none."""
    return (folder / ARRAY / METADATA).exists()


def find_slots(folder: Path, spec: PageSpec) -> int:
    """The number of slots of an array for pages of the whole model. Raises ConfigError when it was not made by distkv,
    OtherPagesError when its metadata are those of other pages, and else DamagedError when they are not what they
    were."""
    path = folder / ARRAY
    if _made_by_distkv(path) is False:
        raise _foreign(path)
    try:
        array = zarr.open_array(LocalStore(folder / ARRAY), mode="r")
        attributes = {name: array.attrs.get(name) for name in ("distkv", "dtype", "codec")}
        expected = page_array(MemoryStore(), spec, array.shape[0]).metadata
    except Exception as error:  # zarr has no common base of what it raises
        raise DamagedError(f"the metadata of {str(path)!r} cannot be read ({error})") from error
    codec = None if spec.format is None else spec.format.name
    is_other = attributes != {"distkv": FORMAT, "dtype": spec.dtype, "codec": codec}
    if is_other or (array.shape[1:], array.chunks) != (spec.page_shape, expected.chunks):
        raise OtherPagesError(
            f"{str(path)!r} does not hold {codec or spec.dtype} pages of shape {list(spec.page_shape)} in format "
            f"{FORMAT}, and what it holds is given up"
        )
    if array.metadata.to_dict() != expected.to_dict():
        raise DamagedError(f"the metadata of {str(path)!r} are not what they were")
    return array.shape[0]


def check_metadata(folder: Path, spec: PageSpec | None) -> None:
    """Raises DamagedError when those of an array are damaged or lost, ConfigError when it was not made by distkv.

    Args:
        spec: the pages of the whole model, where they are known.
    """
    array = folder / ARRAY
    if not array.exists():
        return
    if not array.is_dir():
        raise _foreign(array)
    if spec is not None and not has_array(folder):
        raise DamagedError(f"{str(array)!r} has no {METADATA}")
    if spec is not None:
        find_slots(folder, spec)
    elif has_array(folder) and _made_by_distkv(array) is None:
        raise DamagedError(f"the metadata of {str(array)!r} cannot be read")


def renew_metadata(folder: Path, spec: PageSpec | None, num_pages: int) -> None:
    """Makes those of an array again, or removes them where its pages are not known, so that an engine makes them."""
    take_away(folder / ARRAY / METADATA)
    if spec is not None:
        _write_metadata(folder, spec, num_pages)


def mend_array(folder: Path, spec: PageSpec, num_pages: int) -> None:
    """Makes metadata of an array that are damaged or lost again. The pages in it stay, since they are checked when they
    are taken over, unless they are other ones.

    Raises ConfigError when the array was not made by distkv, StoreError when it cannot be written.
    """
    array = folder / ARRAY
    if array.exists() and not has_array(folder):
        if not _is_named_as_ours(array):
            raise _foreign(array)
        _write_metadata(folder, spec, num_pages)
    elif has_array(folder):
        try:
            find_slots(folder, spec)
        except DamagedError as error:
            if isinstance(error, OtherPagesError):
                remove_catalogue(folder)
            set_aside(folder / ARRAY / METADATA, error)
            _write_metadata(folder, spec, num_pages)


def fit_array(folder: Path, spec: PageSpec, num_pages: int) -> None:
    """Makes an array, or gives the one found, see `mend_array`, another number of slots and leaves its chunks.

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
        replace_file(path, json.dumps(metadata, indent=2).encode(), syncs=True)
    except OSError as error:
        raise StoreError(
            f"the array in cache_dir {str(folder)!r} cannot be resized ({error.strerror}); make room on the disk, or "
            "leave disk_kv_bytes as it was"
        ) from error


def remove_array(folder: Path) -> None:
    """Deletes the array with all its pages, and the catalogue. Raises ConfigError when it is not distkv's."""
    array = folder / ARRAY
    if array.exists():
        ours = _made_by_distkv(array)
        if ours is None:  # killed before it wrote the metadata, or while it swept; or they are damaged
            ours = _is_named_as_ours(array)
        if not ours:
            raise _foreign(array)
        left = [path for path in array.iterdir() if path.name != METADATA]
        if left:
            log.info("removing %d files that an earlier process left in %s", len(left), array)
        remove_catalogue(folder)  # first, so that it never lists what is gone
        for path in left:  # the metadata goes last: a process killed meanwhile leaves an array that is known as ours
            path.unlink(missing_ok=True)
        shutil.rmtree(array)
    remove_catalogue(folder)


def _write_metadata(folder: Path, spec: PageSpec, num_pages: int) -> None:
    content: dict[str, Buffer] = {}
    page_array(MemoryStore(content), spec, num_pages)
    try:
        make_folder(folder / ARRAY)
        replace_file(folder / ARRAY / METADATA, content[METADATA].to_bytes(), syncs=True)
    except OSError as error:
        raise StoreError(f"the array in cache_dir {str(folder)!r} cannot be made: {error}") from error


def page_array(store: Store, spec: PageSpec, num_pages: int, name: str | None = None) -> Any:
    """Makes an array without pages, the store's only one or one of a name."""
    dtype = STORED_DTYPES[spec.stored_dtype]
    return zarr.create_array(
        store=store,
        name=name,
        shape=(num_pages, *spec.page_shape),
        dtype=dtype,
        **_stored_as(spec, np.dtype(dtype).itemsize),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},  # one flat folder
        dimension_names=("slot", "layer", "kv", "kv_head", "token", "head_dim" if spec.format is None else "byte"),
        attributes={"distkv": FORMAT, "dtype": spec.dtype, **_codec_attributes(spec)},
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


def _made_by_distkv(array: Path) -> bool | None:
    """What the metadata of a Zarr array or group say of its maker; None when there are none, or damaged ones. Raises
    StoreError when they cannot be read."""
    try:
        metadata = json.loads((array / METADATA).read_bytes())
        return metadata["attributes"].get("distkv") is not None if "zarr_format" in metadata else None
    except KeyError:
        return False
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{str(array / METADATA)!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _is_named_as_ours(array: Path) -> bool:
    return array.is_dir() and all(map(_is_named_by_distkv, array.iterdir()))


def _is_named_by_distkv(path: Path) -> bool:
    return path.suffix == ".partial" or path.name in (METADATA, METADATA + DAMAGED) or bool(parse_chunk(path.name))


def _foreign(array: Path) -> ConfigError:
    return ConfigError(f"{str(array)!r} was not made by distkv; name another cache_dir")
