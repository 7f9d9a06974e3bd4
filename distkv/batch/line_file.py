"""A file that grows by whole lines, whatever ends the process or fills the disk."""

import os
from contextlib import suppress
from pathlib import Path

from distkv.errors import StoreError
from distkv.storage.disk.files import sync_folder


class LineFile:
    """Appends lines to a file, which is made with the first of them unless it is there."""

    def __init__(self, path: Path):
        """Opens a file that is there, so that one that goes before the first line is missed. Raises StoreError."""
        self.path = path
        self._fd: int | None = None
        self._size = 0
        self._is_synced = True
        self._is_named = False  # for good
        try:
            with suppress(FileNotFoundError):
                self._open(0)
        except OSError as error:
            raise StoreError(unwritten(path, error)) from error

    def append(self, line: bytes) -> None:
        """Writes a line; the system has it when this returns, so that it outlives the process. Raises StoreError when
        it cannot be written as a whole, and then nothing of it is there."""
        try:
            fd = self._open(os.O_CREAT) if self._fd is None else self._fd
            num_written = 0
            while num_written < len(line):
                num_written += os.write(fd, line[num_written:])
        except OSError as error:
            self._cut()
            raise StoreError(unwritten(self.path, error)) from error
        self._size += len(line)
        self._is_synced = False

    def sync(self) -> None:
        """Has the disk have what was written, so that it outlives the machine's end. Raises StoreError, also when the
        file has been removed or moved, or another one has its name."""
        if self._fd is None:
            return
        self._check_place(self._fd)
        if self._is_synced:
            return
        self._is_synced = True  # what is appended meanwhile, by another thread, may not be
        try:
            os.fsync(self._fd)
            if not self._is_named:
                with suppress(PermissionError):  # one may write to a folder that one may not read
                    sync_folder(self.path.parent)
                self._is_named = True
        except OSError as error:
            self._is_synced = False
            raise StoreError(unwritten(self.path, error)) from error

    def close(self) -> None:
        """Closes the file. A second call does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _open(self, flags: int) -> int:
        self._fd = fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | flags, 0o666)
        self._size = os.fstat(fd).st_size
        return fd

    def _check_place(self, fd: int) -> None:
        """Whoever looks for the lines looks for them by the file's name."""
        try:
            is_there = os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            raise StoreError(unwritten(self.path, error)) from error
        if not is_there:
            raise StoreError(
                f"{str(self.path)!r} has been removed, moved or replaced while lines were written to it; put it back "
                "if it is elsewhere, and run the same command again to go on"
            )

    def _cut(self) -> None:
        if self._fd is not None:
            with suppress(OSError):  # else the next start cuts it
                os.ftruncate(self._fd, self._size)


def unwritten(path: Path, error: OSError) -> str:
    """What a user is told of a file that cannot be written in the middle of a run."""
    return (
        f"{str(path)!r} cannot be written: {error.strerror}; all lines before are there. See to that, and run the same "
        "command again to go on"
    )
