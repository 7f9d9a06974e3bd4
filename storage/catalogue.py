"""What lies on disk, in SQLite: an entry is there only while its page's bytes are."""

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from distkv.errors import StoreError
from distkv.storage.cache_folder import CATALOGUE


class Catalogue:
    """Table `pages (slot INTEGER PRIMARY KEY, crc32c BLOB)`: per page the checksums of all ranks in order, each as
    `DiskPool.checksums` gives them. A kill at any moment leaves it consistent (write-ahead log)."""

    def __init__(self, folder: Path):
        """Opens or makes the catalogue of a cache folder; raises StoreError when it cannot be written."""
        try:
            self._folder = folder
            self._database = sqlite3.connect(folder / CATALOGUE, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS pages (slot INTEGER PRIMARY KEY, crc32c BLOB NOT NULL)")
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue in {folder} cannot be opened: {error}") from error

    def update(self, removed: Iterable[int], added: Mapping[int, bytes]) -> None:
        """Takes entries out and puts others in, at once."""
        try:
            with self._database:
                self._database.execute("BEGIN")
                self._database.executemany("DELETE FROM pages WHERE slot = ?", [(slot,) for slot in removed])
                self._database.executemany("INSERT OR REPLACE INTO pages VALUES (?, ?)", list(added.items()))
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue of the disk tier cannot be written: {error}") from error

    def entries(self) -> dict[int, bytes]:
        """Slot -> checksums of all pages."""
        return dict(self._database.execute("SELECT slot, crc32c FROM pages ORDER BY slot"))

    def close(self) -> None:
        self._database.close()

    def discard(self) -> None:
        """Removes the catalogue, which is better than one that is not true."""
        self.close()
        for path in self._folder.glob(f"{CATALOGUE}*"):
            path.unlink(missing_ok=True)
