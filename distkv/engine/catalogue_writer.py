"""Brings the catalogue of the disk tier up to date, and takes over what earlier processes left."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from distkv.errors import StoreError
from distkv.storage.disk.cache_folder import DamagedError
from distkv.storage.disk.catalogue import (
    LOCK_WAIT,
    Catalogue,
    Entry,
    TakenOverError,
    read_catalogue,
    set_aside_catalogue,
)
from distkv.storage.ledger.disk_journal import DiskChanges
from distkv.storage.ledger.page import PageKey
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import DISK
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan

log = logging.getLogger(__name__)

LEAST_SECONDS = 1e-3  # between two uses, whatever the clock says
RETRY_SECONDS = 1.0  # after which a catalogue that could not be written is tried again


class CatalogueWriter:
    """Keeps the catalogue of a cache folder true while the engine runs.

    What cannot be written, since the disk is full for a moment or another program has locked the file, waits for a
    later try. Until then the catalogue may list a slot whose page is another one now; see the head of `catalogue.py`.
    """

    def __init__(self, folder: Path, cache: TieredCache):
        self._folder = folder
        self._cache = cache
        self._catalogue: Catalogue | None = None  # from the first change on
        # what is to be written; for each slot of the disk once at most
        self._removed: set[int] = set()
        self._added: dict[int, Entry] = {}
        self._touched: set[int] = set()
        self._owner = uuid4().hex
        self._is_taken_over = False
        self._latest = 0.0  # use of all, in unix seconds
        self._failure: StoreError | None = None  # of the last try
        self._next_try = 0.0  # monotonic seconds

    def adopt(self, run: Callable[[StepPlan], Report]) -> None:
        """Takes in the pages that an earlier process left, as far as all ranks can vouch for them. Raises StoreError
        when the catalogue cannot be read now, so that no page is taken for one that is not listed."""
        entries, listed = read_catalogue(self._folder)
        num_slots = self._cache.slots[DISK].num_slots
        entries = [one for one in entries if one.slot < num_slots]  # others were given up and could not be taken out
        report = run(StepPlan([], [], [], adopt={one.slot: one.crc32c for one in entries}))
        missing = set(report.missing)
        kept: dict[bytes, int] = {}  # slots of pages that can be read, with all pages before them
        for one in sorted(entries, key=lambda one: one.index):
            if one.slot not in missing and (one.index == 0 or one.parent in kept):
                kept[one.key] = one.slot
        self._removed = listed - set(kept.values())
        with suppress(StoreError):  # when it is written it is tried again, and said
            self._open(0.0)
        self._latest = max((one.last_use for one in entries), default=0.0)
        self._cache.adopt(
            (one.slot, one.index, PageKey(one.key, one.parent, one.tokens)) for one in entries if one.key in kept
        )
        self._write()
        if missing:
            log.warning(
                "%d of %d KV pages on disk are missing and are not used: %s", len(missing), len(entries), report.lack
            )
        log.info("%d KV pages of earlier processes are on disk", len(kept))

    def add(self, entries: Iterable[Entry]) -> None:
        """Puts pages in that came from elsewhere; the cache adopts them."""
        if self._is_taken_over:
            return
        now = self._now()
        self._added |= {entry.slot: entry._replace(last_use=now) for entry in entries}
        self._write()

    def update(self, changes: DiskChanges, checksums: dict[int, bytes]) -> None:
        """Takes vacated disk slots out before they can be written again, and puts new pages in; without waiting.

        Args:
            changes: since the last update.
            checksums: of pages written to disk, by transfer id.
        """
        if self._is_taken_over:
            return
        now = self._now()
        for slot in changes.vacated:
            self._added.pop(slot, None)
        self._removed |= changes.vacated
        for slot, (id, page) in changes.written.items():
            if id in checksums and page.key is not None:
                key = page.key
                self._added[slot] = Entry(slot, key.digest, key.parent, key.tokens, checksums[id], now, page.index)
        self._touched = (self._touched - changes.vacated) | changes.touched
        if time.monotonic() >= self._next_try:
            self._write()

    @property
    def pause(self) -> float | None:
        """Seconds until what could not be written is tried again, which an update does; None where nothing waits."""
        return max(0.0, self._next_try - time.monotonic()) if self._has_changes else None

    def close(self) -> None:
        """Writes what is left to be written, for which it waits, and closes the catalogue."""
        if self._catalogue is not None:
            self._catalogue.wait(LOCK_WAIT)
        self._write(LOCK_WAIT)
        if self._added:
            log.warning("%s; later processes will not find %d of the pages on disk", self._failure, len(self._added))
        self._close_file()

    @property
    def _has_changes(self) -> bool:
        return bool(self._removed or self._added or self._touched)

    def _write(self, wait: float = 0.0) -> None:
        """Writes what waits, if it can.

        Args:
            wait: seconds for another program's lock, where the file is not open yet.
        """
        if self._is_taken_over or not self._has_changes:
            return
        try:
            try:
                self._update(wait)
            except DamagedError as error:
                self._make_again(error)
                self._update(wait)
        except TakenOverError as error:
            log.error("%s while this one stood still; later processes will not find its pages", error)
            self._is_taken_over = True
            self._removed, self._added, self._touched = set(), {}, set()
        except StoreError as error:
            self._put_off(error)  # the file stays open, with the room that its log has
        else:
            self._removed, self._added, self._touched = set(), {}, set()
            if self._failure is not None:
                log.info("the catalogue in %s is up to date again", self._folder)
            self._failure = None

    def _update(self, wait: float) -> None:
        self._open(wait).update(self._removed, self._added.values(), self._touched, self._now())

    def _open(self, wait: float) -> Catalogue:
        """The catalogue, which is this engine's from now on."""
        if self._catalogue is None:
            catalogue = Catalogue(self._folder, wait=wait)
            try:
                catalogue.claim(self._owner)
            except BaseException:
                catalogue.close()
                raise
            self._catalogue = catalogue
        return self._catalogue

    def _now(self) -> float:
        """Unix seconds, but behind every earlier use: after a clock was set back, the next process would give up first
        what was used last."""
        self._latest = max(time.time(), self._latest + LEAST_SECONDS)
        return self._latest

    def _make_again(self, reason: DamagedError) -> None:
        """Sets a damaged catalogue aside. Nobody has the checksums of the pages in it any more, but for what waits."""
        self._close_file()
        set_aside_catalogue(self._folder, reason)
        slots = {page.slots[DISK] for page in self._cache.index if page.has(DISK)}
        if lost := len(slots - self._added.keys()):
            log.warning("later processes will not find %d of the pages on disk, which it listed", lost)

    def _put_off(self, error: StoreError) -> None:
        if self._failure is None:
            log.warning("%s; it is tried again every %g s", error, RETRY_SECONDS)
        self._failure = error
        self._next_try = time.monotonic() + RETRY_SECONDS

    def _close_file(self) -> None:
        if self._catalogue is not None:
            self._catalogue.close()
            self._catalogue = None
