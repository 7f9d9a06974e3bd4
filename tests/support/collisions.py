"""Keys of pages that are all the same."""

import pytest

from distkv.storage.ledger import prefix_index


class ConstantHash:
    """A hash that is zero, whatever it is of."""

    def __init__(self, content: bytes):
        pass

    def digest(self) -> bytes:
        return bytes(32)


def collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every page get the same key."""
    monkeypatch.setattr(prefix_index, "sha256", ConstantHash)
