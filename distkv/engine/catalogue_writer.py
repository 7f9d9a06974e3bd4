"""Brings the catalogue of the disk tier up to date, and takes over what earlier processes left."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from distkv.errors import StoreError
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.ledger.disk_journal import DiskChanges
from distkv.storage.ledger.page import PageKey
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan

log = logging.getLogger(__name__)


class CatalogueWriter:
    """Keeps the catalogue of a cache folder true while the engine runs."""

    def __init__(self, folder: Path, cache: TieredCache):
        """Raises StoreError or ConfigError when the folder's catalogue cannot be used."""
        self._cache = cache
        self._catalogue: Catalogue | None = Catalogue(folder)

    def adopt(self, run: Callable[[StepPlan], Report]) -> None:
        """Takes in the pages that an earlier process left, as far as all ranks can vouch for them."""
        assert self._catalogue is not None
        entries = self._catalogue.entries()
        report = run(StepPlan([], [], [], adopt={one.slot: one.crc32c for one in entries}))
        missing = set(report.missing)
        kept: dict[bytes, int] = {}  # slots of pages that can be read, with all pages before them
        for one in sorted(entries, key=lambda one: one.index):
            if one.slot not in missing and (one.index == 0 or one.parent in kept):
                kept[one.key] = one.slot
        self._catalogue.update(self._catalogue.slots() - set(kept.values()), [])
        self._cache.adopt(
            (one.slot, one.index, PageKey(one.key, one.parent, one.tokens)) for one in entries if one.key in kept
        )
        if missing:
            log.warning("%d of %d KV pages on disk are missing and are not used", len(missing), len(entries))
        log.info("%d KV pages of earlier processes are on disk", len(kept))

    def update(self, changes: DiskChanges, checksums: dict[int, bytes]) -> None:
        """Takes vacated disk slots out before they can be written again, and puts new pages in.

        Args:
            changes: since the last update.
            checksums: of pages written to disk, by transfer id.
        """
        if self._catalogue is None or not changes:
            return
        now = time.time()
        added = [
            Entry(slot, page.key.digest, page.key.parent, page.key.tokens, checksums[id], now, page.index)
            for slot, (id, page) in changes.written.items()
            if id in checksums and page.key is not None
        ]
        try:
            self._catalogue.update(changes.vacated, added, changes.touched, now)
        except StoreError as error:
            log.warning("%s; this run goes on without a catalogue", error)
            catalogue, self._catalogue = self._catalogue, None
            try:
                catalogue.discard()
            except OSError as left:
                log.warning(
                    "the catalogue cannot be removed either: %s; pages that it lists are checked when read", left
                )

    def close(self) -> None:
        if self._catalogue is not None:
            self._catalogue.close()
