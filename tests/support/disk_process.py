"""The disk tier of an engine of one rank, with its catalogue and without a model."""

from pathlib import Path

from support.disks import description
from support.pages import SPEC, load, random_page, same

from distkv.engine.catalogue_writer import CatalogueWriter
from distkv.storage.disk.cache_folder import FolderLock
from distkv.storage.disk.catalogue import read_catalogue
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.disk.reopen import reopen
from distkv.storage.disk.synced_pages import SyncedPages
from distkv.storage.errors import StoreError
from distkv.storage.ledger.disk_journal import DiskChanges
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.disk_pool import DiskPool
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan


class DiskProcess:
    """Opens a folder as an engine does. The page of key N has the bits of `random_page(spec, N)`."""

    def __init__(self, folder: Path, num_pages: int, spec: PageSpec = SPEC):
        self.spec = spec
        self._lock = FolderLock(folder)
        reopen(folder, spec, num_pages, description(spec))
        self._synced = SyncedPages(folder, has_catalogue=True)
        heads = DiskShare.of_all(spec)
        self.pool = DiskPool(spec, folder, num_pages, heads, synced=self._synced)
        self._writer = CatalogueWriter(folder, TieredCache((2, 2, num_pages), 1))
        entries, _ = read_catalogue(folder)
        missing: list[int] = []

        def adopt(plan: StepPlan) -> Report:
            assert plan.adopt is not None
            missing.extend(self.pool.adopt(plan.adopt))
            return Report(missing=missing)

        self._writer.adopt(adopt)
        self.keys = {one.slot: int(one.key) for one in entries if one.slot not in missing}  # by slot

    def give_up(self, slot: int) -> None:
        del self.keys[slot]
        self._writer.update(DiskChanges(vacated={slot}), {})

    def write(self, slot: int, key: int) -> None:
        """Raises StoreError."""
        self.pool.store(slot, random_page(self.spec, key))
        page = Page(0, key=PageKey(b"%d" % key, b"root", b"tokens"))
        self._writer.update(DiskChanges(written={slot: (0, page)}), {0: self.pool.checksums(slot)})
        self.keys[slot] = key

    def sync(self) -> None:
        """Syncs a batch before its time."""
        self._synced.sync()
        assert not self._synced._has_failed

    def read(self) -> set[int]:
        """The keys of all pages that can be read; each has its own bits."""
        found = set()
        for slot, key in self.keys.items():
            try:
                page = load(self.pool, slot, self.spec)
            except StoreError:  # which has it computed again
                continue
            assert same(page, random_page(self.spec, key)), "a page was taken for another"
            found.add(key)
        return found

    def kill(self) -> None:
        """Leaves all as it is, but the lock and the thread, which end with a process."""
        self._synced._end.set()
        self._synced._thread.join()
        self._lock.release()

    def close(self) -> None:
        self._writer.close()
        self.pool.close()
        self._lock.release()
