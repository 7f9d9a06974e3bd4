"""What lies on disk, in SQLite: an entry is there only while its page's bytes are."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from distkv.storage.disk.cache_folder import CATALOGUE, remove_catalogue
from distkv.storage.errors import ConfigError, StoreError

COLUMNS = """(
    slot INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, parent BLOB NOT NULL, tokens BLOB NOT NULL,
    crc32c BLOB NOT NULL, last_use REAL NOT NULL, "index" INTEGER NOT NULL
)"""


class Entry(NamedTuple):
    """A full page on disk."""

    slot: int
    key: bytes  # of the tokens up to the page's end
    parent: bytes  # key of the page before it in its sequence; of a first page, anything that is not listed
    tokens: bytes
    crc32c: bytes  # uint32 `[kv_head, layer]` of the whole model, in C order
    last_use: float  # unix seconds
    index: int  # type: ignore[assignment]  # place in its sequence, 0 for a first page


class Catalogue:
    """Table `pages`, a row per `Entry`. A kill at any moment leaves it consistent (write-ahead log)."""

    def __init__(self, folder: Path, read_only: bool = False):
        """Opens or makes the catalogue of a cache folder; `read_only` for a look beside the process that uses it.

        Raises StoreError when it cannot be opened or written, ConfigError when the file is something else.
        """
        self._folder = folder
        path = folder / CATALOGUE
        try:
            if read_only:
                self._database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            else:
                self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.execute(f"CREATE TABLE IF NOT EXISTS pages {COLUMNS}")
            found = self._database.execute("SELECT sql FROM sqlite_master WHERE name = 'pages'").fetchone()
        except sqlite3.OperationalError as error:
            raise StoreError(f"the catalogue in {folder} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{str(path)!r} is no catalogue ({error}); remove {str(folder)!r}") from error
        if found is None or found[0] != f"CREATE TABLE pages {COLUMNS}":
            self.close()
            raise ConfigError(f"{str(path)!r} is the catalogue of another version or program; remove {str(folder)!r}")

    def update(
        self, removed: Iterable[int], added: Iterable[Entry], touched: Iterable[int] = (), now: float = 0.0
    ) -> None:
        """Takes the entries of some slots out, puts others in and sets the last use of the `touched` slots to `now`,
        all at once."""
        try:
            with self._database:
                self._database.execute("BEGIN")
                self._database.executemany("DELETE FROM pages WHERE slot = ?", [(slot,) for slot in removed])
                self._database.executemany("INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)", added)
                self._database.executemany(
                    "UPDATE pages SET last_use = ? WHERE slot = ?", [(now, slot) for slot in touched]
                )
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue of the disk tier cannot be written: {error}") from error

    def entries(self) -> list[Entry]:
        """The pages that can be used, in the order in which they may be given up: the least recently used first, and a
        page before its parent, which counts as used whenever the page is. A page whose parent is not listed is left
        out, and so are those that follow it."""
        listed: dict[bytes, Entry] = {}
        for entry in self._rows():
            parent = listed.get(entry.parent)
            if entry.index == 0 or (parent is not None and parent.index == entry.index - 1):
                listed[entry.key] = entry
        used = {entry.key: entry.last_use for entry in listed.values()}
        for entry in reversed(listed.values()):  # followers first
            if entry.index:
                used[entry.parent] = max(used[entry.parent], used[entry.key])
        return sorted(listed.values(), key=lambda entry: (used[entry.key], -entry.index, entry.slot))

    def slots(self) -> set[int]:
        """All slots that are listed, those of pages that cannot be used too."""
        return {entry.slot for entry in self._rows()}

    def close(self) -> None:
        self._database.close()

    def discard(self) -> None:
        """See `remove_catalogue`."""
        self.close()
        remove_catalogue(self._folder)

    def _rows(self) -> list[Entry]:
        """In the order of `index`."""
        try:
            return [Entry(*row) for row in self._database.execute('SELECT * FROM pages ORDER BY "index", slot')]
        except sqlite3.Error as error:
            raise StoreError(
                f"the catalogue in {self._folder} cannot be read: {error}; remove that folder or name another"
            ) from error
