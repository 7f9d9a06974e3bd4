"""A file that one process at a time may hold, and that names its holder."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from distkv.storage.disk.files import make_folder


class HeldError(Exception):
    """The lock is held already; its text names the holder."""


class FileLock:
    """A lock, held until `release` or the end of the process. A process that is forked meanwhile does not hold it."""

    def __init__(self, path: Path):
        """Makes the file and its folder if need be. Raises OSError when it cannot be opened or locked, HeldError
        when another process or another part of this one holds it."""
        make_folder(path.parent)
        self._file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise HeldError(holder) from None
        except OSError:
            self._file.close()
            raise
        with suppress(OSError):  # a full disk has no room for the name, which is there for the reader alone
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(self)

    @property
    def is_held(self) -> bool:
        return not self._file.closed

    def release(self) -> None:
        """Lets others have it. A second call does nothing."""
        if self.is_held:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # at once, though a process may be on its way from fork to exec
            self._file.close()


_held: WeakSet[FileLock] = WeakSet()


def _let_go() -> None:
    """In a forked process: it neither keeps a lock beyond its parent's end nor gives it away before."""
    for lock in list(_held):
        lock._file.close()


os.register_at_fork(after_in_child=_let_go)


def is_locked(path: Path) -> bool:
    """Whether somebody, this process perhaps, holds the lock."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
