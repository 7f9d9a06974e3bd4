"""Where the disk tier of an engine lies, and which of its ranks writes which heads there.

The folder has one path on all nodes. It may be one folder that all of them see, or one on the disk of each node: ranks
find out which by empty files that those before them have left, since a name can be made once, even over NFS.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from distkv.storage.disk.cache_folder import ARRAY, FolderLock
from distkv.workers.errors import ConfigError

WRITER = "writer"  # begins the names of the files that ranks leave


@dataclass(frozen=True)
class CachePlace:
    """The sub-folder of cache_dir that an engine uses; the same for all ranks."""

    folder: Path
    fingerprint: str = ""  # of all that the pages depend on, where they outlive the engine; see `fingerprint.py`
    engine: str = field(default_factory=lambda: uuid4().hex)  # tells its ranks from those of others


@contextmanager
def join_folder(place: CachePlace, head: int) -> Iterator[tuple[bool, bool]]:
    """Makes a rank one of those that use the folder as its node sees it, after the ranks before it, until the end of
    the context.

    Args:
        head: the first KV head of the rank.

    Gives whether it is the first of its engine there, and so holds the folder's lock, and whether it is the first there
    that has these heads, and so writes them. Raises ConfigError when the folder cannot be used or another engine uses
    it.
    """
    folder, mine = place.folder, place.folder / f"{WRITER}.{place.engine}.{head}"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch(exist_ok=False)  # before others are looked for, so that what a node has cached is asked again
        except FileExistsError:
            yield False, False
            return
        except OSError as error:
            raise ConfigError(
                f"cache_dir {str(folder)!r} cannot be used ({error.strerror}); name a folder that can be written"
            ) from error
        stack.callback(mine.unlink, missing_ok=True)
        others = [file for file in folder.glob(f"{WRITER}.*") if file != mine]
        is_first = not any(file.name.startswith(f"{WRITER}.{place.engine}.") for file in others)
        if is_first:
            stack.callback(FolderLock(folder).release)
            for file in others:  # of engines that were killed
                file.unlink(missing_ok=True)
        yield is_first, True


def free_bytes(folder: Path) -> int:
    """What is free on this node where the folder is or will be, or is taken by the pages in it; twice as much as these
    at least, so that a tier of half of it holds them though somebody else fills the disk.

    Raises ConfigError where no folder can be.
    """
    taken, place = 0, folder
    try:
        with suppress(FileNotFoundError), os.scandir(folder / ARRAY) as files:
            for file in files:
                with suppress(FileNotFoundError):  # whoever uses the folder removes and renames files
                    taken += file.stat().st_size
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
    return max(usage.free, taken) + taken
