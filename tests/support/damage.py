"""What can happen to a file of a page."""

import os
from pathlib import Path

import pytest


def page_files(cache_dir: Path) -> list[Path]:
    """Those of whole pages, in order; others are being written."""
    return sorted(path for path in cache_dir.rglob("c.*") if path.suffix != ".partial")


def flip_bit(file: Path) -> None:
    """Changes a bit behind the first third, which in a page of 3 layers is in layer 1."""
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    """Leaves the first half."""
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    """Leaves as many zeros as there were bytes."""
    file.write_bytes(bytes(file.stat().st_size))


def swap(file: Path) -> None:
    """Changes places with the file beside it."""
    files = page_files(file.parent)
    other = files[files.index(file) - 1]
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


_COMMON = {"flipped bit": flip_bit, "truncated": cut_short, "missing": Path.unlink}
_ALL = _COMMON | {"zeros": zero, "swapped": swap}

damages = pytest.mark.parametrize("damage", _COMMON.values(), ids=_COMMON)
"""Each kind of damage in turn."""

all_damages = pytest.mark.parametrize("damage", _ALL.values(), ids=_ALL)
"""The same and rarer ones."""
