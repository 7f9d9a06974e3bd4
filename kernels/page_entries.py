"""The entries of the tables by which kernels find pages: a slot of the device pool is itself, and an index into a
buffer of the staging ring is the negative integer that these two know."""

from typing import TypeVar

import numpy as np

Integer = TypeVar("Integer", int, np.ndarray)


def buffer_entry(index: Integer) -> Integer:
    """The entry of a page that lies at an index of its load's buffer."""
    return -1 - index


def buffer_index(entry: Integer) -> Integer:
    """The index in the buffer of an entry that is negative."""
    return -1 - entry
