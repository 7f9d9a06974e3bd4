"""Where the disk tier of an engine lies, and which of its ranks writes which part of the pages there.

The folder has one path on all nodes. It may be one folder that all of them see, or one on the disk of each node: ranks
find out which by empty files that those before them have left, since a name can be made once, even over NFS.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from distkv.storage.disk.cache_folder import FULL, SWEEPER, DamagedError, FolderLock, InUseError, read_description
from distkv.storage.disk.files import make_folder
from distkv.storage.disk.page_arrays import DiskShare, PageArray, find_arrays, parse_chunk
from distkv.workers.errors import ConfigError

log = logging.getLogger(__name__)

WRITER = "writer"  # begins the names of the files that ranks leave
NAME_WAIT = 1.0  # seconds in which whoever has just locked a folder of pages that are dropped has said who it is


@dataclass(frozen=True)
class CachePlace:
    """The sub-folder of cache_dir that an engine uses; the same for all ranks."""

    folder: Path
    fingerprint: str = ""  # of all that the pages depend on, where they outlive the engine; see `fingerprint.py`
    kernels: str = ""  # by which the ranks compute, for people
    engine: str = field(default_factory=lambda: uuid4().hex)  # tells its ranks from those of others


@dataclass(frozen=True)
class Joined:
    """A rank among those of its engine that use a folder."""

    lock: FolderLock | None  # of the folder, where it is the first of them
    makes_array: bool  # whether it is the first that writes to its array
    writes: bool  # whether it is the first that has its part of the pages


@contextmanager
def join_folder(place: CachePlace, share: DiskShare, is_alone: bool = False) -> Iterator[Joined]:
    """Makes a rank one of those that use the folder as its node sees it, after the ranks before it, until the end of
    the context.

    Args:
        share: the rank's.
        is_alone: the engine has no other rank, so that no file need tell one of it.

    Raises ConfigError when the folder cannot be used or another engine uses it.
    """
    (first, end), (head, _) = share.layers, share.heads
    mine = place.folder / f"{WRITER}.{place.engine}.{first}-{end}.{head}.{share.part}"
    with ExitStack() as stack:
        try:
            make_folder(place.folder)
            signs = not is_alone and _sign(place, mine, stack)
        except OSError as error:
            raise ConfigError(
                f"cache_dir {str(place.folder)!r} cannot be used ({error.strerror}); name a folder that can be written"
            ) from error
        lock, makes_array, others = None, is_alone, []
        if signs or is_alone:
            others = [file for file in place.folder.glob(f"{WRITER}.*") if file != mine]
            before = [file.name for file in others if file.name.startswith(f"{WRITER}.{place.engine}.")]
            makes_array = not any(name.startswith(f"{WRITER}.{place.engine}.{first}-{end}.") for name in before)
            if not before:
                try:
                    lock = _lock(place)
                    stack.callback(lock.release)
                except InUseError as error:
                    if error.owner != place.engine:
                        raise  # else a rank on another node is the first, whose file is not seen here yet
        if lock is not None:
            for file in others:  # of engines that were killed
                file.unlink(missing_ok=True)
        yield Joined(lock, makes_array, signs or is_alone)


def stages_here(place: CachePlace) -> set[tuple[int, int]]:
    """The layers of the engine's ranks that use the folder as this node sees it, where all of them have joined."""
    names = (file.name.split(".") for file in place.folder.glob(f"{WRITER}.{place.engine}.*"))
    return {(int(first), int(end)) for _, _, layers, *_ in names for first, end in [layers.split("-")]}


def _sign(place: CachePlace, mine: Path, stack: ExitStack) -> bool:
    """Leaves a rank's file, before others are looked for, so that what a node has cached is asked again; False where a
    rank before it has the same part. Where there is no room for a file, those make some that killed engines have left.
    Raises OSError."""
    try:
        mine.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in FULL or any(place.folder.glob(f"{WRITER}.{place.engine}.*")):
            raise
        lock = _lock(place)
        try:
            for file in [*place.folder.glob(f"{WRITER}.*"), *place.folder.rglob("*.partial")]:
                file.unlink(missing_ok=True)
            mine.touch(exist_ok=False)
        finally:
            lock.release()
    stack.callback(mine.unlink, missing_ok=True)
    return True


def _lock(place: CachePlace) -> FolderLock:
    """The right to use the folder. Whoever sweeps pages that are dropped is waited for, however many they are."""
    deadline, is_told = 0.0 if place.fingerprint else time.monotonic() + NAME_WAIT, False
    while True:
        try:
            return FolderLock(place.folder, place.engine)
        except InUseError as error:
            if error.owner.startswith(SWEEPER):
                deadline = time.monotonic() + NAME_WAIT  # the next holder may be another one
                if not is_told:
                    log.warning("another process removes what a killed engine left, and is waited for: %s", error)
                is_told = True
            elif time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def free_bytes(folder: Path) -> int:
    """What is free on this node where the folder is or will be, or is taken by the pages in it; twice as much as these
    count with at least, so that a tier of half of it holds them though somebody else fills the disk.

    Raises ConfigError where no folder can be.
    """
    taken, counted, place = 0, 0, folder
    try:
        for array in find_arrays(folder):
            most = _most_file_bytes(folder, array)
            with suppress(FileNotFoundError), os.scandir(folder / array.name) as files:
                for file in files:
                    with suppress(FileNotFoundError):  # whoever uses the folder removes and renames files
                        size = file.stat().st_size
                        taken += size
                        counted += max(size, most if parse_chunk(file.name) else 0)
        while not place.exists():
            place = place.parent
        usage = shutil.disk_usage(place)
    except OSError as error:
        raise ConfigError(
            f"cache_dir {str(folder)!r} cannot be used ({error.strerror}); name another folder"
        ) from error
    if not usage.total or (not usage.free and not os.access(place, os.W_OK)):
        raise ConfigError(
            f"cache_dir {str(folder)!r} cannot be used: {str(place)!r} is no place for files; name a folder on a disk"
        )
    return max(usage.free + taken, 2 * counted)


def _most_file_bytes(folder: Path, array: PageArray) -> int:
    """What a file of the pages in an array counts with in a tier, compressed or not; 0 where that is not known."""
    with suppress(DamagedError, ConfigError):
        if (known := read_description(folder)) is not None:
            first, end = array.range(known.num_layers)
            files = known.num_layers * known.num_kv_heads * known.decode_context_parallel_size
            return -(-known.page_bytes * (end - first) // files)
    return 0
