"""What the runner of plans keeps when it is interrupted."""

import pytest
from support.speaker import make

from distkv.storage.ledger.disk_journal import DiskChanges
from distkv.workers.group.report import Report


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


def test_a_disk_that_refuses_pages_is_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Until it takes some again; a page that cannot be read is another matter."""
    engine, _ = make()
    full, gone = "no space left", "page 3 is gone"
    for _ in range(3):
        engine._runner.take_in(Report(bad_reads=[(1, full), (2, full)]))
    assert caplog.messages == [full]
    engine._runner.take_in(Report(bad_reads=[(3, gone)]))
    assert caplog.messages == [full, gone] and engine._runner.damage == gone
    engine._runner.take_in(Report(bad_reads=[(1, full)]))
    engine._runner.take_in(Report(checksums={7: b"crc"}))
    engine._runner.take_in(Report(bad_reads=[(1, full)]))
    assert caplog.messages == [full, gone, full, full]
    engine.close()
