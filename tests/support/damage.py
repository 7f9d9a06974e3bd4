"""What can happen to a file of a page."""

import os
from pathlib import Path

import pytest


def flip_bit(file: Path) -> None:
    """Changes a bit behind the first third, which in a page of 3 layers is in layer 1."""
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    """Leaves the first half."""
    os.truncate(file, file.stat().st_size // 2)


damages = pytest.mark.parametrize(
    "damage", [flip_bit, cut_short, Path.unlink], ids=["flipped bit", "truncated", "missing"]
)
"""Each kind of damage in turn."""
