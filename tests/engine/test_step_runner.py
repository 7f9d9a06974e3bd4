"""What the runner of plans keeps when it is interrupted."""

import pytest
from support.speaker import make

from distkv.storage.ledger.disk_journal import DiskChanges


class Writer:
    """A `CatalogueWriter` whose first update is interrupted."""

    def __init__(self) -> None:
        self.updates: list[DiskChanges] = []

    def update(self, changes: DiskChanges, checksums: dict[int, bytes]) -> None:
        self.updates.append(changes)
        if len(self.updates) == 1:
            raise KeyboardInterrupt

    def close(self) -> None:
        """There is nothing to close."""


def test_an_update_of_the_catalogue_that_is_interrupted_is_made_again() -> None:
    """Else it would list a slot whose page has gone."""
    engine, _ = make()
    writer = engine._runner._catalogue_writer = Writer()  # type: ignore[assignment]
    engine._cache.journal.vacate(3)
    with pytest.raises(KeyboardInterrupt):
        engine._runner.drain()
    engine._runner.drain()
    engine._runner.drain()
    assert writer.updates == [DiskChanges({3}), DiskChanges({3}), DiskChanges()]
    engine.close()
