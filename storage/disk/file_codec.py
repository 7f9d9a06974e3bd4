"""How one KV head of a page is stored as a file of the disk tier, and one layer of it read back."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class FileDamage(ValueError):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


class ChecksumDamage(FileDamage):
    """The content is not what was written."""


class FileCodec(Protocol):
    """The files of pages of one `PageSpec`. Any thread may call it."""

    def encode(self, head: np.ndarray) -> bytes | memoryview:
        """The content of a file from one head's bits, integers `[layer, 2, page_size, head_dim]`."""

    def check_size(self, size: int) -> None:
        """Raises FileDamage when a file of so many bytes cannot be whole."""

    def read_index(self, descriptor: int) -> Any:
        """What `read` has to know of an open file. Raises OSError or FileDamage."""

    def span(self, index: Any, layer: int) -> tuple[int, int]:
        """Where a layer's keys and values begin in the file, and how many bytes they take there."""

    def read(self, descriptor: int, index: Any, layer: int, pieces: Sequence[memoryview]) -> int:
        """Reads a layer's keys and values, each into its own contiguous memory; returns how many bytes the file gave.

        What was read need not be what was written: the caller knows its checksum. Raises OSError or FileDamage.
        """
