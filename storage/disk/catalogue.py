"""What lies on disk, in SQLite: an entry is there only while its page's bytes are.

Where it could not be written an entry may outlive its page. Its checksums are no longer those of the file then, so that
the page counts as damaged when it is read.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from distkv.storage.disk.cache_folder import CATALOGUE, DamagedError, remove_catalogue, set_aside
from distkv.storage.disk.catalogue_file import close, open_to_read, open_to_write
from distkv.storage.errors import StoreError

COLUMNS = """(
    slot INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, parent BLOB NOT NULL, tokens BLOB NOT NULL,
    crc32c BLOB NOT NULL, last_use REAL NOT NULL, "index" INTEGER NOT NULL
)"""
# SQLite takes any value in any column
IS_ENTRY = """slot >= 0 AND typeof(key) = 'blob' AND typeof(parent) = 'blob' AND typeof(tokens) = 'blob' AND
    typeof(crc32c) = 'blob' AND typeof(last_use) = 'real' AND last_use BETWEEN 0 AND 1e11 AND
    typeof("index") = 'integer' AND "index" >= 0"""
LOCK_WAIT = 5.0  # seconds for which whoever is not in a hurry waits for a program that has locked the catalogue

SQLITE_ERRORS = sqlite3.Error, UnicodeDecodeError  # the text of one may quote what is no text
# results of SQLite that speak of the file's content; all others, such as a lock or a full disk, may be gone next time
_OF_CONTENT = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Entry(NamedTuple):
    """A full page on disk."""

    slot: int
    key: bytes  # of the tokens up to the page's end
    parent: bytes  # key of the page before it in its sequence; of a first page, anything that is not listed
    tokens: bytes
    crc32c: bytes  # uint32 `[kv_head, layer]` of the whole model, in C order
    last_use: float  # unix seconds
    index: int  # type: ignore[assignment]  # place in its sequence, 0 for a first page


class TakenOverError(StoreError):
    """The catalogue belongs to another engine now."""


class Catalogue:
    """Table `pages`, a row per `Entry`. A kill at any moment leaves it consistent (write-ahead log)."""

    def __init__(self, folder: Path, read_only: bool = False, wait: float = LOCK_WAIT):
        """Opens or makes the catalogue of a cache folder; with `read_only` one that is not there lists nothing.

        Args:
            read_only: for a look beside the process that uses it, or on a disk that has no room left.
            wait: seconds for which a lock of another program is waited for, where need be.

        Raises, as all methods do, DamagedError when the file is something else, and StoreError when it cannot be
        opened or written now.
        """
        self._folder = folder
        self._owner: str | None = None  # that has claimed it here
        path = folder / CATALOGUE
        if path.is_dir():
            raise DamagedError(f"{str(path)!r} is a folder and no catalogue")
        try:
            self._database = open_to_read(path, wait) if read_only else open_to_write(path, wait, f"pages {COLUMNS}")
        except (*SQLITE_ERRORS, OSError) as error:
            raise self._failure("opened", error) from error
        try:
            found = self._schema()
            if found not in (None, f"CREATE TABLE pages {COLUMNS}".encode()):
                raise DamagedError(f"{str(path)!r} is the catalogue of another version or program")
        except BaseException:
            self.close()
            raise
        self._is_empty = found is None

    def claim(self, owner: str) -> None:
        """Writes down who owns the pages from now on; see `update`."""
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute("CREATE TABLE IF NOT EXISTS owner (id TEXT NOT NULL)")
                self._database.execute("DELETE FROM owner")
                self._database.execute("INSERT INTO owner VALUES (?)", (owner,))
        except SQLITE_ERRORS as error:
            raise self._failure("written", error) from error
        self._owner = owner

    def update(
        self, removed: Iterable[int], added: Iterable[Entry], touched: Iterable[int] = (), now: float = 0.0
    ) -> None:
        """Takes the entries of some slots out, puts others in and sets the last use of the `touched` slots to `now`,
        all at once. Raises TakenOverError, and changes nothing, when another engine has claimed it after this one."""
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                if self._owner is not None and self._owners() != [self._owner.encode()]:
                    raise TakenOverError(f"another engine has taken the catalogue in {self._folder} over")
                self._database.executemany("DELETE FROM pages WHERE slot = ?", [(slot,) for slot in removed])
                self._database.executemany("INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)", added)
                self._database.executemany(
                    "UPDATE pages SET last_use = ? WHERE slot = ?", [(now, slot) for slot in touched]
                )
        except SQLITE_ERRORS as error:
            raise self._failure("written", error) from error

    def _owners(self) -> list[bytes]:
        return [row[0] for row in self._database.execute("SELECT id FROM owner")]

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

    def check(self) -> None:
        """Has SQLite look for damage that does not show when rows are read."""
        if self._is_empty:
            return
        try:
            [[found]] = self._database.execute("PRAGMA integrity_check(1)").fetchall()
        except SQLITE_ERRORS as error:
            raise self._failure("read", error) from error
        if found != b"ok":
            raise DamagedError(f"the catalogue in {self._folder} is damaged ({found.decode(errors='replace')})")

    def wait(self, seconds: float) -> None:
        """Sets how long a lock of another program is waited for from now on."""
        self._database.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")

    def close(self) -> None:
        close(self._database)

    def _schema(self) -> bytes | None:
        """How the table was made; None when there is none."""
        try:
            row = self._database.execute("SELECT sql FROM sqlite_master WHERE name = 'pages'").fetchone()
        except SQLITE_ERRORS as error:
            raise self._failure("read", error) from error
        return None if row is None else row[0]

    def _rows(self) -> list[Entry]:
        """In the order of `index`."""
        if self._is_empty:
            return []
        try:
            rows = self._database.execute(f'SELECT *, {IS_ENTRY} FROM pages ORDER BY "index", slot').fetchall()
        except SQLITE_ERRORS as error:
            raise self._failure("read", error) from error
        if not all(row[-1] for row in rows):
            raise DamagedError(f"the catalogue in {self._folder} has rows that are no pages")
        return [Entry(*row[:-1]) for row in rows]

    def _failure(self, verb: str, error: Exception) -> StoreError:
        """What to raise for one of SQLITE_ERRORS."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        kind = DamagedError if code in _OF_CONTENT or isinstance(error, UnicodeDecodeError) else StoreError
        return kind(f"the catalogue in {self._folder} cannot be {verb}: {error}")


def read_catalogue(folder: Path) -> tuple[list[Entry], set[int]]:
    """`Catalogue.entries` and `slots` of a locked folder; nothing where the catalogue is damaged, which is set aside
    then. Raises StoreError when it cannot be read now."""
    try:
        with closing(Catalogue(folder, read_only=True)) as catalogue:
            return catalogue.entries(), catalogue.slots()
    except DamagedError as error:
        set_aside_catalogue(folder, error)
        return [], set()


def set_aside_catalogue(folder: Path, reason: object) -> None:
    """See `set_aside`. Nobody may have the catalogue open. Raises StoreError."""
    set_aside(folder / CATALOGUE, reason)
    remove_catalogue(folder)  # what is left of it would be taken for the new one's
