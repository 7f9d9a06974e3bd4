"""What a loss of power may leave of a folder: a stand-in at the calls by which this process writes.

It takes POSIX at its word, and no file system keeps less: a file's bytes are there once it is synced, names once their
folder is. Before that a name may stand for whatever it stood for since its folder was synced, whatever became of other
names, and the bytes of a file may be missing, old, cut off, zeros or torn.

SQLite is taken at its word too: with a write-ahead log and synchronous = NORMAL there is left what some commit left,
and none older than the last one of which the log was synced, or taken back into the file as it is closed.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distkv.storage.disk.cache_folder import CATALOGUE, CATALOGUE_LOG
from distkv.storage.disk.catalogue import Catalogue, Entry

Call = Callable[..., None]

BLOCK = 512  # bytes that a disk writes as one


class File:
    """The bytes of a file, and those that are sure to stay."""

    def __init__(self, path: Path):
        self.content = path.read_bytes()
        self.synced: bytes | None = None

    def leave(self, target: Path, rng: random.Random) -> None:
        content, old = self.content, self.synced
        if content != old:
            cut = content[: rng.randrange(len(content) + 1)]
            content = rng.choice([content, old or b"", b"", cut, bytes(len(content)), self._torn(rng)])
        target.write_bytes(content)

    def _torn(self, rng: random.Random) -> bytes:
        torn, zeros = bytearray(self.content), bytes(BLOCK)
        for start in range(0, len(torn), BLOCK):
            if rng.random() < 0.5:
                torn[start : start + BLOCK] = zeros[: len(torn[start : start + BLOCK])]
        return bytes(torn)


class Table:
    """The rows of a catalogue after each commit that may be the last one."""

    def __init__(self) -> None:
        self.commits: list[list[Entry]] = [[]]

    def sync(self) -> None:
        del self.commits[:-1]

    def leave(self, target: Path, rng: random.Random) -> None:
        with closing(Catalogue(target.parent)) as catalogue:
            catalogue.update([], rng.choice(self.commits))


class Folder:
    """The names in a folder, and for each what it may stand for, the last one without a loss."""

    def __init__(self) -> None:
        self.names: dict[str, list[File | Table | Folder | None]] = {}

    def get(self, name: str) -> "File | Table | Folder | None":
        return self.names.get(name, [None])[-1]

    def put(self, name: str, what: "File | Table | Folder | None") -> None:
        self.names.setdefault(name, [None]).append(what)

    def sync(self) -> None:
        self.names = {name: past[-1:] for name, past in self.names.items() if past[-1] is not None}

    def leave(self, target: Path, rng: random.Random) -> None:
        target.mkdir()
        for name, past in self.names.items():
            if (left := rng.choice(past)) is not None:
                left.leave(target / name, rng)


class PowerLoss:
    """Follows what this process does below a folder that is empty, in the context of `followed`."""

    def __init__(self, root: Path):
        self._path, self._root = root, Folder()
        self._lock = threading.RLock()  # so that what is done and what is noted of it are one
        self.num_calls = 0  # that changed what may be left
        self.called: Callable[[], None] = lambda: None  # after each of them

    def leave(self, target: Path, rng: random.Random) -> None:
        """Makes a folder of what may be left if power fails now."""
        with self._lock:
            self._look_for_new(self._root, self._path)
            self._root.leave(target, rng)

    @contextmanager
    def followed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace", "link"):
                self._patch(patch, os, name, partial(self._named_anew, keeps=name == "link"))
            for name in ("unlink", "remove", "rmdir"):
                self._patch(patch, os, name, self._removed)
            for name in ("fsync", "fdatasync"):
                self._patch(patch, os, name, self._synced)
            self._patch(patch, os, "mkdir", self._made)
            self._patch(patch, Catalogue, "update", self._committed)
            self._patch(patch, Catalogue, "close", self._closed)
            yield

    def _patch(self, patch: pytest.MonkeyPatch, owner: Any, name: str, follow: Callable[[Call], Call]) -> None:
        followed = follow(getattr(owner, name))

        def call(*arguments: Any, **options: Any) -> None:
            with self._lock:
                followed(*arguments, **options)

        patch.setattr(owner, name, call)

    def _named_anew(self, real: Call, keeps: bool) -> Call:
        def call(source: Any, target: Any, **options: Any) -> None:
            old, new = self._inside(source), self._inside(target)
            file = None if old is None else self._file(old)
            real(source, target, **options)
            if old is not None and new is not None:
                if isinstance(file, Table):  # it is set aside
                    file = File(new)
                self._folder(new.parent).put(new.name, file)
                if not keeps:
                    self._folder(old.parent).put(old.name, None)
                self._count()

        return call

    def _removed(self, real: Call) -> Call:
        def call(path: Any, dir_fd: int | None = None) -> None:
            real(path, dir_fd=dir_fd)
            where = self._inside(path, dir_fd)
            if where is not None and not where.name.startswith(f"{CATALOGUE}-"):
                self._folder(where.parent).put(where.name, None)
                self._count()

        return call

    def _made(self, real: Call) -> Call:
        def call(path: Any, *arguments: Any) -> None:
            real(path, *arguments)
            if (where := self._inside(path)) is not None:
                self._folder(where.parent).put(where.name, Folder())
                self._count()

        return call

    def _synced(self, real: Call) -> Call:
        def call(descriptor: int) -> None:
            where = self._inside(os.readlink(f"/proc/self/fd/{descriptor}"))
            if where is not None:
                if where == self._path or where.is_dir():
                    self._look_for_new(self._folder(where), where)
                    self._folder(where).sync()
                elif where.name == CATALOGUE_LOG:
                    self._table(where.parent).sync()
                elif where.name == f"{CATALOGUE_LOG} (deleted)":
                    return  # the catalogue was closed meanwhile, see `_closed`
                else:
                    file = self._file(where)
                    assert isinstance(file, File)
                    file.synced = file.content
                self._count()
            else:
                real(descriptor)

        return call

    def _committed(self, real: Call) -> Call:
        def call(catalogue: Catalogue, *arguments: Any, **options: Any) -> None:
            real(catalogue, *arguments, **options)
            if catalogue._folder.is_relative_to(self._path):
                self._table(catalogue._folder).commits.append(catalogue._rows())
                self._count()

        return call

    def _closed(self, real: Call) -> Call:
        def call(catalogue: Catalogue) -> None:
            real(catalogue)
            folder = catalogue._folder
            is_last = (folder / CATALOGUE).exists() and not (folder / CATALOGUE_LOG).exists()
            if folder.is_relative_to(self._path) and is_last:
                self._table(folder).sync()
                self._count()

        return call

    def _count(self) -> None:
        self.num_calls += 1
        self.called()

    def _inside(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """An absolute path below the folder; None for others."""
        base = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        whole = Path(base, os.fspath(path)).absolute()
        return whole if whole.is_relative_to(self._path) else None

    def _folder(self, path: Path) -> Folder:
        folder = self._root
        for part in path.relative_to(self._path).parts:
            found = folder.get(part)
            assert isinstance(found, Folder), f"{path} was made unseen"
            folder = found
        return folder

    def _file(self, path: Path) -> File | Table | Folder | None:
        """What a name stands for; the bytes of a file are looked at again."""
        folder = self._folder(path.parent)
        found = folder.get(path.name)
        if found is None and path.is_file():
            folder.put(path.name, File(path))
        elif isinstance(found, File):
            found.content = path.read_bytes()
        return folder.get(path.name)

    def _table(self, folder: Path) -> Table:
        known = self._folder(folder)
        if not isinstance(known.get(CATALOGUE), Table):
            known.put(CATALOGUE, Table())
        found = known.get(CATALOGUE)
        assert isinstance(found, Table)
        return found

    def _look_for_new(self, folder: Folder, path: Path) -> None:
        """Files that were opened and written, and neither renamed nor synced yet."""
        for one in path.iterdir():
            if isinstance(inner := folder.get(one.name), Folder):
                self._look_for_new(inner, one)
            elif not one.name.startswith(CATALOGUE):
                self._file(one)
