"""Writes pages of a cache folder to a file that another machine's engine can take in, see `export_format.py`."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from distkv import __version__
from distkv.cache_folders.export_format import FORMAT, Manifest, Table, page_member, write_table
from distkv.cache_folders.export_store import Put
from distkv.cache_folders.model_cache import ModelCache
from distkv.cache_folders.stored_heads import StoredHeads
from distkv.errors import StoreError
from distkv.outputs import CacheExport, PromptExport
from distkv.storage.disk.catalogue import Entry
from distkv.storage.disk.page_arrays import Chunk
from distkv.storage.ledger.prefix_index import page_keys, root_key


class CachedPrefixes:
    """The pages of one model and salt that lie in a cache folder; an engine may be using it."""

    def __init__(self, cache: ModelCache, cache_salt: str | None = None):
        """Raises DamagedError or StoreError when it is not known what lies there."""
        self.cache = cache
        self._root = root_key(cache.description.fingerprint, cache_salt)
        self._by_key = {entry.key: entry for entry in cache.entries()}

    @property
    def page_size(self) -> int:
        """In tokens."""
        return self.cache.description.num_tokens

    def longest(self, token_ids: Sequence[int]) -> list[Entry]:
        """The pages of the longest prefix of a prompt that are there."""
        found = []
        for key in page_keys(self._root, token_ids, self.page_size):
            entry = self._by_key.get(key.digest)
            if entry is None or entry.tokens != key.tokens:
                break
            found.append(entry)
        return found

    def all(self) -> list[list[Entry]]:
        """All prefixes, each with its pages in order."""
        followed = {entry.parent for entry in self._by_key.values()}
        chains = [self._chain(entry) for entry in self._by_key.values() if entry.key not in followed]
        return [chain for chain in chains if chain[0].parent == self._root]

    def _chain(self, entry: Entry) -> list[Entry]:
        chain = [entry]
        while chain[-1].index:
            chain.append(self._by_key[chain[-1].parent])
        return chain[::-1]


def export_pages(
    store: AbstractContextManager[Put],
    cache: ModelCache,
    prefixes: Iterable[Sequence[Entry]],
    sessions: Mapping[str, dict[str, Any]],
    prompts: Iterable[PromptExport] = (),
) -> CacheExport:
    """Writes the pages of some prefixes, each page once, and sessions.

    Args:
        store: where to.
        prefixes: of each the entries of its pages, from the first one on.
        sessions: content of their files, by name.
        prompts: what is to be said of them.

    Raises StoreError when a page is damaged or was given up meanwhile, and what `store` does.
    """
    entries = {entry.key: entry for prefix in prefixes for entry in prefix}
    rows = {key: row for row, key in enumerate(entries)}
    known = cache.description
    pages = msgspec.structs.replace(known, model=Path(known.model).name)  # a path tells of the machine
    table, stored = Table.empty(pages, len(rows)), cache.stored
    for entry, row in zip(entries.values(), rows.values(), strict=True):
        if (len(entry.tokens), len(entry.crc32c)) != (table.tokens[row].nbytes, table.checksums[row].nbytes):
            raise StoreError(
                f"slot {entry.slot} is listed in {str(cache.folder)!r} as a page of another size; "
                "`distkv cache verify --repair` takes it out"
            )
        table.tokens[row] = np.frombuffer(entry.tokens, "<u4")
        table.parents[row] = rows[entry.parent] if entry.index else -1
        table.checksums[row] = np.frombuffer(entry.crc32c, np.uint32).reshape(table.checksums.shape[1:])
    num_bytes = 0
    with store as put:
        write_table(put, Manifest(FORMAT, __version__, len(rows), pages, dict(sessions)), table)
        for entry, row in zip(entries.values(), rows.values(), strict=True):
            for head, checksums in zip(stored.of(entry.slot), table.checksums[row].tolist(), strict=True):
                content = _read(stored, head, checksums)
                put(page_member(row, head.head, head.part), content)
                num_bytes += len(content)
    return CacheExport(len(rows), len(rows) * known.num_tokens, num_bytes, list(prompts))


def _read(stored: StoredHeads, head: Chunk, checksums: list[int]) -> bytes:
    """The content of a head's file, which is that of these checksums."""
    content, problem = stored.read(head, checksums)
    if problem is not None:
        raise StoreError(
            f"{problem}. If an engine runs, it has given the page up; export again. Else "
            "`distkv cache verify --repair` takes out what is damaged"
        )
    return content
