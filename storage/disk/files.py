"""Files and folders that outlive a kill and, synced, a loss of power."""

import errno
import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes | memoryview, syncs: bool = False) -> None:
    """Writes a file so that a kill at any moment leaves the old content or the new.

    Args:
        syncs: so does a loss of power, and when this returns the content is there to stay.

    Raises OSError.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        if syncs:
            sync_file(partial)
        partial.replace(path)
        if syncs:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Syncs the bytes of a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder, where the file system can do that for itself. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Makes a folder, and those above it, where they are not there, and syncs their names. Raises OSError."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode if one == folder else 0o777, exist_ok=True)
        with suppress(PermissionError):  # one may write to a folder that one may not read
            sync_folder(one.parent)
    if not missing:
        folder.mkdir(exist_ok=True)  # raises where it is a file
