"""The members of an exported cache, whatever holds them: a folder, or a zip file whose members are stored as they are.

A member is a key of the Zarr store, such as `pages/c.0.0.0.0.0.0`.
"""

import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Protocol

from distkv.errors import ConfigError, StoreError
from distkv.storage.disk.files import sync_file, sync_folder

FOLDER, ZIP = ".zarr", ".zip"  # how the names end
PIECE_BYTES = 2**20  # that are sent at a time
AGAIN = "copy or export it again"
_ZIP_ERRORS = zipfile.BadZipFile, EOFError, ValueError, struct.error, NotImplementedError  # of a damaged one

Put = Callable[[str, bytes | memoryview], None]
"""Writes a member."""


def check_target(path: Path) -> None:
    """Raises ConfigError where no store can be made: something lies there, or the name says not what it is to be."""
    if path.suffix not in (FOLDER, ZIP):
        raise ConfigError(f"{str(path)!r} ends neither in {FOLDER}, for a folder, nor in {ZIP}; name one that does")
    if os.path.lexists(path):
        raise _taken(path)


@contextmanager
def new_store(path: Path) -> Iterator[Put]:
    """Makes a store that its owner alone may read: whole at the end of the context, and synced, and not at all when
    anything is raised in it, or the process is killed. Until then it grows in a folder of its own beside that place.

    Raises ConfigError as `check_target` does, also when something has come to lie there meanwhile, StoreError when it
    cannot be written.
    """
    check_target(path)
    try:
        with TemporaryDirectory(".partial", f".{path.name}.", path.parent, ignore_cleanup_errors=True) as folder:
            partial = Path(folder, path.name)
            with _new_zip(partial) if path.suffix == ZIP else _new_folder(partial) as put:
                yield put
            _move(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{str(path)!r} cannot be written: {error.strerror}; make room for it, or name another place"
        ) from error


def _move(partial: Path, path: Path) -> None:
    """Moves a store to its place. A rename alone would replace a file there, and links are not to be had everywhere, so
    the place is taken by an empty file or folder first; that is what a kill just between the two leaves."""
    try:
        path.mkdir() if partial.is_dir() else path.touch(exist_ok=False)
    except FileExistsError:
        raise _taken(path) from None
    try:
        partial.rename(path)
    except OSError:
        path.rmdir() if path.is_dir() else path.unlink()
        raise


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{str(path)!r} is there already; remove it, or name another one")


@contextmanager
def _new_zip(path: Path) -> Iterator[Put]:
    path.touch(0o600, exist_ok=False)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        yield lambda name, content: file.writestr(zipfile.ZipInfo(name), bytes(content))
    sync_file(path)


@contextmanager
def _new_folder(path: Path) -> Iterator[Put]:
    written: list[Path] = []

    def put(name: str, content: bytes | memoryview) -> None:
        target = path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        written.append(target)

    path.mkdir(0o700)
    yield put
    for file in written:
        sync_file(file)
    for folder in {file.parent for file in written}:
        sync_folder(folder)


@contextmanager
def sent_zip(write: Callable[[bytes], object]) -> Iterator[Put]:
    """Has a zip file written as it is made. It has no end, and so is none, when anything is raised in the context."""
    pipe = _Pipe(write)
    file = zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED)
    try:
        yield lambda name, content: file.writestr(zipfile.ZipInfo(name), bytes(content))
        file.close()
        pipe.flush_pieces()
    finally:
        pipe.is_open = False  # for what zipfile would write when it is collected


class _Pipe:
    """A file that cannot be sought, written in larger pieces than a zip file is."""

    def __init__(self, write: Callable[[bytes], object]):
        self.is_open = True
        self._write, self._waiting = write, bytearray()

    def write(self, content: bytes, /) -> int:
        if self.is_open:
            self._waiting += content
            if len(self._waiting) >= PIECE_BYTES:
                self.flush_pieces()
        return len(content)

    def flush(self) -> None:
        """zipfile does so after each member, which is no reason to write it."""

    def close(self) -> None:
        """For zipfile, which does not call it."""

    def flush_pieces(self) -> None:
        """Writes what waits."""
        waiting, self._waiting = bytes(self._waiting), bytearray()
        self._write(waiting)


class StoreReader(Protocol):
    """Reads a store that anybody may have made. All raise StoreError for what is missing, of another kind or cannot be
    read."""

    def size(self, name: str) -> int:
        """Bytes of a member."""

    def read(self, name: str) -> bytes:
        """A member, of whose size the caller has made sure."""


@contextmanager
def open_store(path: Path) -> Iterator[StoreReader]:
    """Opens a store. Raises ConfigError when there is none, StoreError when it cannot be read."""
    if path.is_dir():
        yield FolderReader(path)
        return
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise ConfigError(f"{str(path)!r} does not exist; name what `distkv cache export` has written") from None
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except _ZIP_ERRORS as error:
        raise StoreError(f"{str(path)!r} is no whole zip file ({error}); {AGAIN}") from error
    with file:
        if sum(member.file_size for member in file.infolist()) > path.stat().st_size:
            raise StoreError(f"{str(path)!r} has members that are larger than it is: compressed ones, or none; {AGAIN}")
        yield ZipReader(path, file)


class FolderReader:
    """Follows no links."""

    def __init__(self, path: Path):
        self._path = path

    def size(self, name: str) -> int:
        with self._reading(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str) -> bytes:
        with self._reading(name) as file:
            return file.read()

    @contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes]]:
        path = self._path / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise StoreError(f"{str(path)!r} is no plain file; {AGAIN}")
            with open(path, "rb") as file:
                yield file
        except FileNotFoundError:
            raise StoreError(f"{str(path)!r} is missing; {AGAIN}") from None
        except OSError as error:
            raise StoreError(f"{str(path)!r} cannot be read: {error.strerror}") from error


class ZipReader:
    """Of members that are stored as they are, so that none is larger than the file itself."""

    def __init__(self, path: Path, file: zipfile.ZipFile):
        self._path, self._file = path, file

    def size(self, name: str) -> int:
        return self._member(name).file_size

    def read(self, name: str) -> bytes:
        try:
            content = self._file.read(self._member(name))
        except _ZIP_ERRORS as error:
            raise StoreError(f"{name} in {str(self._path)!r} is damaged ({error}); {AGAIN}") from error
        except OSError as error:
            raise StoreError(f"{str(self._path)!r} cannot be read: {error.strerror}") from error
        return content

    def _member(self, name: str) -> zipfile.ZipInfo:
        try:
            member = self._file.getinfo(name)
        except KeyError:
            raise StoreError(f"{str(self._path)!r} has no {name}; {AGAIN}") from None
        is_plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
        if not is_plain or member.file_size != member.compress_size:
            raise StoreError(f"{name} in {str(self._path)!r} is compressed or encrypted; store it as it is (zip -0)")
        return member
