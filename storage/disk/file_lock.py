"""A file that one process at a time may hold, and that says who holds it.

The lock is the kernel's, so it ends with its holder, and on a node's own disk that is all. Other nodes may not see it:
Lustre with localflock, NFS with nolock and BeeGFS keep locks to a node. So the file has a nonce of its holder, who
gives signs of life on such file systems, and whoever finds that another node held the lock waits for one first.

A holder may remove the file. Whoever has opened it by then would lock a file that nobody else finds, so he opens the
one that is there now.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4
from weakref import WeakSet, ref

from distkv.storage.disk.files import make_folder
from distkv.storage.disk.mounts import is_local

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0  # between two signs of life
SILENCE_SECONDS = 15.0  # without one, after which a holder on another node counts as dead
CLAIM_SECONDS = 1.0  # in which another node that saw the lock free at the same time has written its nonce
MOST_OPENED = 100  # files of one name that are removed before they are locked; then another process has it
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells kernels apart, of which each knows its own locks


@dataclass(frozen=True)
class Holder:
    """What the file says of who holds it or, when it was killed, held it."""

    name: str = ""  # for people
    kernel: str = ""
    owner: str = ""  # nonce

    @classmethod
    def read(cls, path: Path) -> "Holder":
        """As the file is now, on whatever node it was written. Raises OSError."""
        name, _, rest = path.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
        kernel, _, owner = rest.partition(" ")
        return cls(name, kernel, owner)


class HeldError(Exception):
    """The lock is held already; its text names the holder."""

    def __init__(self, holder: Holder):
        super().__init__(holder.name or "another process")
        self.owner = holder.owner


class FileLock:
    """A lock, held until `release` or the end of the process. A process that is forked meanwhile does not hold it."""

    def __init__(self, path: Path, owner: str = "", mode: int = 0o666):
        """Makes the file and its folder if need be.

        Args:
            owner: a nonce, one of its own unless it is given.
            mode: of a file that it makes, from which the umask takes.

        Raises OSError when it cannot be opened or locked, HeldError when another process or another part of this one
        holds it.
        """
        make_folder(path.parent)
        self._path, self._owner = path, owner or uuid4().hex
        for _ in range(MOST_OPENED):
            self._file = open(  # noqa: SIM115
                path, "a+", encoding="utf-8", errors="replace", opener=lambda path, flags: os.open(path, flags, mode)
            )
            try:
                self._lock()
            except FileNotFoundError:  # somebody has removed it
                self._file.close()
            except BaseException:
                self._file.close()
                raise
            else:
                _held.add(self)
                return
        raise HeldError(Holder())

    @property
    def is_held(self) -> bool:
        return not self._file.closed

    @property
    def keeps_others_out(self) -> bool:
        """Whether the kernel does so for it, at least on this node."""
        try:
            return _is_taken(self._path)
        except OSError:
            return False

    @property
    def is_lost(self) -> bool:
        """Whether another process took it over while this one stood still."""
        with suppress(OSError):
            return Holder.read(self._path).owner not in ("", self._owner)
        return False

    def release(self, removes: bool = False) -> None:
        """Lets others have it. A second call does nothing.

        Args:
            removes: the file goes as well, so that names which never come again leave nothing.
        """
        if self.is_held:
            with suppress(OSError):
                owner = Holder.read(self._path).owner
                if removes and owner in ("", self._owner) and self._is_named:  # on a full disk none could be written
                    self._path.unlink()
                elif owner == self._owner:  # and nobody took it over meanwhile
                    os.ftruncate(self._file.fileno(), 0)
            _let_go(self._file)  # at once, though a process may be on its way from fork to exec
            self._file.close()

    @property
    def _is_named(self) -> bool:
        """Whether the file that is locked is the one of that name. Raises OSError."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))

    def _lock(self) -> None:
        """Raises as `__init__` does, and FileNotFoundError where the file that was opened has been removed."""
        try:
            _take(self._file)
        except BlockingIOError:
            raise HeldError(Holder.read(self._path)) from None
        try:
            if not self._is_named:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))
            self._claim()
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, OSError) and self._is_named and not os.fstat(self._file.fileno()).st_size:
                    self._path.unlink()  # there was no room to say whose it is
            _let_go(self._file)
            raise

    def _claim(self) -> None:
        """Writes down who has the lock, unless somebody has it where the lock does not reach. Raises HeldError."""
        works, is_of_node = self.keeps_others_out, is_local(self._path.parent)
        left = Holder.read(self._path)
        if left.name and not (works and (is_of_node or left.kernel == _kernel())):
            self._wait_for_silence(left)
        mine = f"process {os.getpid()} on {socket.gethostname()}\n{_kernel()} {self._owner}\n"
        try:
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), mine.encode())
        except OSError:  # a full disk has no room for that
            if works and is_of_node:
                return
            raise
        if not (works and is_of_node):
            time.sleep(CLAIM_SECONDS)
            if (found := Holder.read(self._path)).owner != self._owner:
                raise HeldError(found)
            threading.Thread(target=_beat, args=(ref(self),), name="lock-beat", daemon=True).start()

    def _wait_for_silence(self, left: Holder) -> None:
        """Raises HeldError when the holder gives a sign of life."""
        log.info("%s may be in use by %s; waiting %g s for a sign of life", self._path, left.name, SILENCE_SECONDS)
        before, end = _sign(self._path), time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 5)
            if _sign(self._path) != before:
                if not (found := Holder.read(self._path)).name:
                    return  # it has just been given back
                raise HeldError(found)


_held: WeakSet[FileLock] = WeakSet()


def _forget() -> None:
    """In a forked process: it neither keeps a lock beyond its parent's end nor gives it away before."""
    for lock in list(_held):
        lock._file.close()


os.register_at_fork(after_in_child=_forget)


def is_locked(path: Path) -> bool:
    """Whether somebody, this process perhaps, holds the lock or may do so on another node; looks and takes nothing."""
    try:
        left = Holder.read(path)
        elsewhere = left.kernel not in ("", _kernel()) and not is_local(path.parent)
        return elsewhere or _is_taken(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _beat(held: "ref[FileLock]") -> None:
    """Gives signs of life as long as the lock is held."""
    while True:
        time.sleep(BEAT_SECONDS)
        lock = held()
        if lock is None or not lock.is_held:
            return
        with suppress(OSError, ValueError):  # it is being released, or cannot be reached for a while
            found = Holder.read(lock._path)
            if found.owner not in ("", lock._owner):
                log.error("%s took %s over while this process stood still; end one of them", found.name, lock._path)
                return
            os.utime(lock._file.fileno())
        del lock


def _sign(path: Path) -> tuple[int, bytes]:
    """What changes with each sign of life; the file is opened for it, which has a network's file system look again."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns, file.read()


def _kernel() -> str:
    with suppress(OSError):
        return BOOT_ID.read_text().strip()
    return socket.gethostname()


# Locks of open files (F_OFD_*), which can be looked at without being taken


def _take(file: IO[str]) -> None:
    """Raises BlockingIOError when another open file has the lock."""
    try:
        _set(file, fcntl.F_WRLCK)
    except PermissionError:  # POSIX lets systems say so
        raise BlockingIOError(errno.EAGAIN, "locked") from None


def _let_go(file: IO[str]) -> None:
    _set(file, fcntl.F_UNLCK)


def _set(file: IO[str], kind: int) -> None:
    """Where there are no such locks it does nothing, and `FileLock` finds out."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _whole_file(kind))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def _is_taken(path: Path) -> bool:
    """Whether another open file of this kernel, or of all where the file system sees to that, has the lock."""
    with open(path, "rb") as file:
        found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process


def _whole_file(kind: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
