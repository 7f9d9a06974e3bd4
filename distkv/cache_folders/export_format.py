"""What an exported cache holds: one Zarr v3 group, plain for whoever opens it. `docs/tiers.md` has it in a table.

pages       as the disk tier's array, a row per page: the same files, see `disk_array.py`
tokens      uint32 `[page, token]`
parents     int64 `[page]`: the row of the page before it in its sequence, which is an earlier one; -1 for first pages
checksums   uint32 `[page, kv_head, layer]`: crc32c of each layer slice of a head, as the catalogue has them; where the
            tokens of a page lie in parts, those of the heads of one part after those of the part before it

The group's attributes are a `Manifest`. Keys of pages are not kept: whoever imports makes them from the tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from distkv.cache_folders.export_store import AGAIN, Put, StoreReader
from distkv.errors import ConfigError, DistKVError, StoreError
from distkv.storage.disk.cache_folder import Description
from distkv.storage.disk.disk_array import METADATA, page_array
from distkv.storage.disk.page_arrays import chunk_name
from distkv.storage.tier import Tier
from distkv.values import quoted, shown

FORMAT = 1
MOST_BYTES = 2**30  # of a member that is no page: tens of millions of tokens
PAGES = "pages"
CRC_BYTES = 4


class Manifest(msgspec.Struct, frozen=True):
    """What an exported cache says of itself."""

    format: int
    distkv: str  # version that wrote it
    num_pages: int
    pages: Description  # whose they are
    sessions: dict[str, dict[str, Any]] = {}  # content of their files, by name


@dataclass(frozen=True)
class Table:
    """What is told of each page, in the order of the rows."""

    tokens: np.ndarray  # uint32 [page, token]
    parents: np.ndarray  # int64 [page]
    checksums: np.ndarray  # uint32 [page, kv_head, layer]

    def __len__(self) -> int:
        return len(self.parents)

    def arrays(self) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
        """The arrays by name, with the names of their dimensions."""
        return {
            "tokens": (self.tokens, ("slot", "token")),
            "parents": (self.parents, ("slot",)),
            "checksums": (self.checksums, ("slot", "kv_head", "layer")),
        }

    @classmethod
    def empty(cls, pages: Description, num_pages: int) -> "Table":
        """One that is to be filled."""
        return cls(
            np.zeros((num_pages, pages.num_tokens), np.uint32),
            np.full(num_pages, -1, np.int64),
            np.zeros((num_pages, pages.num_files, pages.num_layers), np.uint32),
        )


def page_member(row: int, head: int, part: int) -> str:
    """The member of one head of a page, or of a part of its tokens."""
    return f"{PAGES}/{chunk_name(row, head, part)}"


def write_table(put: Put, manifest: Manifest, table: Table) -> None:
    """Writes all but the pages."""
    content: dict[str, Buffer] = {}
    store = MemoryStore(content)
    zarr.create_group(store, attributes={"distkv": msgspec.to_builtins(manifest)})
    page_array(store, manifest.pages.spec, manifest.num_pages, manifest.pages.whole_array, PAGES)
    for name, (values, dimensions) in table.arrays().items():
        if len(table):
            _make(store, name, values, dimensions)[...] = values
        else:
            _make(store, name, values, dimensions)
    for name, buffer in content.items():
        put(name, buffer.to_bytes())


def read_manifest(reader: StoreReader) -> Manifest:
    """Raises StoreError when that is none that can be used, ConfigError for one of a later version."""
    raw = _read(reader, METADATA)
    try:
        content = msgspec.json.decode(raw)
        found = content["attributes"]["distkv"]
        if found["format"] != FORMAT:
            raise ConfigError(
                f"the file is of format {shown(found['format'])} and this distkv reads format {FORMAT}; use the "
                "version that wrote it, or a later one"
            )
        manifest = msgspec.convert(found, Manifest)
        pages = manifest.pages
        page_bytes = pages.spec.page_bytes_in(Tier.DISK) * pages.decode_context_parallel_size
        if manifest.num_pages < 0 or page_bytes != pages.page_bytes:
            raise ValueError("sizes that do not agree")
        return manifest
    except ConfigError:
        raise
    except (DistKVError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(
            f"{METADATA} describes no exported cache ({quoted(error)}); name what `distkv cache export` wrote"
        ) from error


def read_table(reader: StoreReader, manifest: Manifest) -> Table:
    """Reads all but the pages. Raises StoreError for what is missing, damaged, or does not agree with the manifest."""
    pages, count = manifest.pages, manifest.num_pages
    _check_room(reader, pages, count)
    expected = MemoryStore()
    zarr.create_group(expected)
    page_array(expected, pages.spec, count, pages.whole_array, PAGES)
    content: dict[str, Buffer] = {}
    prototype = default_buffer_prototype().buffer
    found = MemoryStore(content)
    table = Table.empty(pages, count)
    for name in (METADATA, f"{PAGES}/{METADATA}", *_members(table)):
        content[name] = prototype.from_bytes(_read(reader, name))
    for name, (values, dimensions) in table.arrays().items():
        _make(expected, name, values, dimensions)
    for name in (PAGES, *table.arrays()):
        _check(found, expected, name)
    for name, (values, _) in table.arrays().items():
        if count:
            try:
                values[...] = zarr.open_array(found, path=name, mode="r")[...]
            except Exception as error:  # zarr has no common base of what it raises
                raise StoreError(f"{name} is damaged ({quoted(error)}); {AGAIN}") from error
    if (table.parents < -1).any() or (table.parents >= np.arange(count)).any():
        raise StoreError(f"parents is no tree of pages; {AGAIN}")
    return table


def _make(store: Store, name: str, values: np.ndarray, dimensions: tuple[str, ...]) -> Any:
    """An array of one chunk, with a checksum."""
    return zarr.create_array(
        store=store,
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=tuple(max(1, size) for size in values.shape),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimensions,
        config={"write_empty_chunks": True},  # a missing one would be read as zeros without a word
    )


def _members(table: Table) -> Iterator[str]:
    for name, (values, _) in table.arrays().items():
        yield f"{name}/{METADATA}"
        if len(table):
            yield f"{name}/c{'.0' * values.ndim}"


def _check_room(reader: StoreReader, pages: Description, count: int) -> None:
    """Makes sure that the store has as many pages as its manifest says, before memory is taken for their table."""
    sizes = {
        "tokens/c.0.0": pages.num_tokens,
        "parents/c.0": 2,
        "checksums/c.0.0.0": pages.num_files * pages.num_layers,
    }
    for name, size in sizes.items():
        if count and reader.size(name) != 4 * count * size + CRC_BYTES:
            raise StoreError(f"{name} is not of {count} pages as the file describes them; {AGAIN}")


def _check(found: Store, expected: Store, name: str) -> None:
    """Raises StoreError when an array is not as distkv makes it."""
    try:
        metadata = zarr.open_array(found, path=name, mode="r").metadata.to_dict()
    except Exception as error:
        raise StoreError(f"the metadata of {name} cannot be read ({quoted(error)}); {AGAIN}") from error
    if metadata != zarr.open_array(expected, path=name, mode="r").metadata.to_dict():
        raise StoreError(f"the metadata of {name} are not those of the pages that the file describes; {AGAIN}")


def _read(reader: StoreReader, name: str) -> bytes:
    if (size := reader.size(name)) > MOST_BYTES:
        raise StoreError(f"{name} has {size} bytes, and {MOST_BYTES} are the most that are read; {AGAIN}")
    return reader.read(name)
