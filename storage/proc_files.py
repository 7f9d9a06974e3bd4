"""What the kernel tells in files of /proc and /sys, where names may have any byte but the end of a line."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """A file system at a place."""

    root: str  # the folder of the file system that is seen there
    point: Path
    kind: str  # as `mount` names it
    options: list[str]  # of the file system


def read_text(path: Path) -> str:
    """The text of a file, with names as `os.fsdecode` has them; empty where there is none for us."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def read_mounts(table: Path) -> list[Mount]:
    """Those that a file like `/proc/self/mountinfo` has, in its order: of two at one place the later one hides the
    earlier. None where the file cannot be read."""
    mounts = []
    for line in read_text(table).split("\n"):
        left, _, right = line.partition(" - ")
        with suppress(ValueError):  # of a line that has fewer fields than the kernel's
            _, _, _, root, point, *_ = left.split(" ")
            kind, _, options = right.split(" ", 2)  # between them is what was mounted, which may have no name
            mounts.append(Mount(_decoded(root), Path(_decoded(point)), _decoded(kind), options.split(",")))
    return mounts


def _decoded(name: str) -> str:
    """A name without the kernel's escapes, which stand for spaces, tabs, ends of lines and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)
