"""How SQLite opens the file of a catalogue.

Where several processes may use it, the index of its write-ahead log lies in a file that each of them maps, and a disk
that fails or becomes read-only under that ends the process (SIGBUS). On a disk of its node, where nobody can take an
engine over, a process has it alone, with all its connections: the index is in memory, and others read a copy.
"""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from distkv.storage.disk.cache_folder import CATALOGUE_LOG
from distkv.storage.disk.mounts import is_local

SHARED, ALONE = "unix", "unix-excl"  # of what SQLite calls VFS
COPIES = 20  # that are tried

_changing = threading.RLock()
"""Held to open and to close, so that what is refused then is in use by another process. A copy of a file which this one
has open would take SQLite's locks away: POSIX drops those of a process when it closes the file anywhere."""


def open_to_write(path: Path, wait: float, table: str) -> sqlite3.Connection:
    """Makes the file and its table if need be.

    Args:
        wait: seconds for which a lock of another program is waited for.
        table: name and columns.

    Raises an error of SQLite.
    """
    with _changing:
        database = _connect(path, "rwc", wait, ALONE if is_local(path.parent) else SHARED)
        with _closed_on_error(database):
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        return database


def open_to_read(path: Path, wait: float) -> sqlite3.Connection:
    """An empty database where there is no file.

    Args:
        wait: see `open_to_write`; where a copy can be read nobody waits.

    Raises an error of SQLite, or OSError.
    """
    if not path.exists():
        return sqlite3.connect(":memory:")
    with _changing:
        return _open_alone(path) if is_local(path.parent) else _open_beside(path, wait)


def close(database: sqlite3.Connection) -> None:
    with _changing:
        database.close()


def _open_alone(path: Path) -> sqlite3.Connection:
    try:
        return _connect_to_read(path, 0.0, ALONE)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN):
            raise
        return _copy(path)


def _open_beside(path: Path, wait: float) -> sqlite3.Connection:
    """Where there is no room for the index, a connection that is alone keeps it in its memory."""
    try:
        return _connect_to_read(path, wait, SHARED)
    except sqlite3.OperationalError:
        return _connect_to_read(path, wait, SHARED, "EXCLUSIVE")


def _copy(path: Path) -> sqlite3.Connection:
    """What another process has written so far, or what lies where nothing can be written.

    The log only grows, and what goes from it to the file is in both until the log begins anew or goes.
    """
    log = path.with_name(CATALOGUE_LOG)
    for _ in range(COPIES):
        with TemporaryDirectory(prefix="distkv-") as folder:
            copy, before = Path(folder, path.name), _state(path, log)
            shutil.copyfile(path, copy)
            with suppress(FileNotFoundError):
                shutil.copyfile(log, copy.with_name(log.name))
            if _state(path, log) == before:
                return _connect_to_read(copy, 0.0, ALONE)  # which has both files open
    raise sqlite3.OperationalError("it is written all the time")


def _state(path: Path, log: Path) -> bytes | int:
    """What stays while a copy of both is whole: the head of the log or, where there is none, when the file changed."""
    with suppress(FileNotFoundError), log.open("rb") as file:
        if head := file.read(32):
            return head
    return path.stat().st_mtime_ns


def _connect_to_read(path: Path, wait: float, use: str, locking: str = "NORMAL") -> sqlite3.Connection:
    """One that may write, so that the last one takes the log away."""
    database = _connect(path, "rw", wait, use)
    with _closed_on_error(database):
        database.execute(f"PRAGMA locking_mode = {locking}")
        database.execute("PRAGMA query_only = ON")
        database.execute("SELECT * FROM sqlite_master").fetchall()  # reads the file
    return database


def _connect(path: Path, mode: str, wait: float, use: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}&vfs={use}"
    database = sqlite3.connect(uri, wait, isolation_level=None, check_same_thread=False, uri=True)
    database.text_factory = bytes  # what is no UTF-8 is found out by its type
    return database


@contextmanager
def _closed_on_error(database: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        database.close()
        raise
