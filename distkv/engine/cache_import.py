"""Takes pages of an exported cache into the disk tier of an engine that runs, a few at a time."""

from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from distkv.cache_folders.import_cache import ExportedCache, ImportedPage, check_same_pages, open_exported, slot_files
from distkv.engine.protocol import EngineInfo
from distkv.engine.step_runner import StepRunner
from distkv.errors import CapacityError, ConfigError, StoreError
from distkv.option_checks import raise_to
from distkv.storage.disk.cache_folder import Description, read_description
from distkv.storage.disk.catalogue import Entry
from distkv.storage.disk.disk_array import has_array
from distkv.storage.disk.page_arrays import find_arrays
from distkv.storage.disk.reopen import join
from distkv.storage.ledger.tiered_cache import TieredCache

PART_BYTES = 64 * 2**20  # that are taken in between two steps


class CacheImport:
    """One file after another, each in parts of consecutive pages. A file stays open from its first part to its last
    one, to an error, or until another one comes between: what it says of its pages takes long to read."""

    def __init__(self, info: EngineInfo, cache: TieredCache, runner: StepRunner):
        self._info, self._cache, self._runner = info, cache, runner
        self._open = ExitStack()
        self._file: tuple[tuple[str, str | None], ExportedCache, list[ImportedPage]] | None = None  # with path and salt

    def take_in(self, path: str, cache_salt: str | None, start: int) -> tuple[int, int]:
        """Takes in the pages from number `start` on, as many as a part has, while no plan runs.

        Returns the number of the page with which to go on, which is that of all pages when this was the last part, and
        how many pages were not there before. Raises ConfigError for pages of no use to this engine, CapacityError when
        the disk tier has no room, and StoreError when a page is damaged or cannot be written, or the file has changed
        so that it has no page of number `start`; none of the part is taken in then.
        """
        own = None if self._info.cache_dir is None else read_description(Path(self._info.cache_dir))
        if own is None or not self._info.fingerprint:
            raise ConfigError("pages are imported to disk; set cache_dir, and leave enable_prefix_caching on")
        is_over = True
        try:
            exported, pages = self._opened(path, cache_salt, own, start)
            if not start:
                self._begin(pages)
            elif start >= len(pages):
                raise StoreError(f"{path!r} has changed while it was taken in; import it again")
            end = min(len(pages), start + max(1, PART_BYTES // own.page_bytes))
            new = [page for page in pages[start:end] if not self._has(page.key.digest)]
            if new:
                self._take_in(exported, new)
            is_over = end == len(pages)
        finally:
            if is_over:
                self.close()
        if is_over:
            self._touch(pages)  # of which the first ones came first, and are to go last
        return end, len(new)

    def close(self) -> None:
        """Closes the file that is open, if any, whatever is still to come of it."""
        self._file = None
        self._open.close()

    def _opened(
        self, path: str, cache_salt: str | None, own: Description, start: int
    ) -> tuple[ExportedCache, list[ImportedPage]]:
        if not start or self._file is None or self._file[0] != (path, cache_salt):
            self.close()
            exported = self._open.enter_context(open_exported(Path(path)))
            check_same_pages(exported, own)
            self._file = (path, cache_salt), exported, exported.keyed(cache_salt)
        return self._file[1:]

    def _begin(self, pages: list[ImportedPage]) -> None:
        most = self._info.num_disk_pages
        if len(pages) > most:
            size = len(pages) * self._info.cold_page_bytes
            raise CapacityError(
                f"the file has {len(pages)} pages and the disk tier holds {most}; {raise_to('disk_kv_bytes', size)}"
            )
        self._cache.retry_disk()
        self._touch(pages)  # those that are there already must not give way to those that follow them

    def _take_in(self, exported: ExportedCache, new: list[ImportedPage]) -> None:
        folder, pages = Path(str(self._info.cache_dir)), exported.pages
        slots, coming = self._cache.make_disk_room(len(new)), {page.key.digest for page in new}
        follows = all(not page.place or page.key.parent in coming or self._has(page.key.parent) for page in new)
        if len(slots) < len(new) or not follows:
            raise CapacityError(
                f"the disk tier has no room for more pages{self._cache.disk_refusal}: requests use too many of its "
                f"{self._info.num_disk_pages}; import again when they have ended, or raise disk_kv_bytes"
            )
        files = {slot: slot_files(folder, slot, pages) for slot in slots}
        stages = [array for array in find_arrays(folder) if array.layers is not None]
        placed = dict(zip(slots, new, strict=True))
        entries = [
            Entry(slot, key.digest, key.parent, key.tokens, exported.checksums(row), 0.0, place)
            for slot, (row, key, place) in placed.items()
        ]

        def fill(entry: Entry) -> None:
            for file in files[entry.slot]:
                for array in stages:  # where ranks would look first
                    (folder / array.name / file.name).unlink(missing_ok=True)
            exported.copy(placed[entry.slot].row, files[entry.slot])

        try:
            if not has_array(folder, pages.whole_array):
                join(folder, pages.spec, self._info.num_disk_pages, pages.whole_array)
            self._runner.take_in_pages(entries, fill)
        except BaseException as error:
            for file in chain.from_iterable(files.values()):
                file.unlink(missing_ok=True)
            self._cache.leave_empty(slots)
            if isinstance(error, OSError):
                raise StoreError(f"pages cannot be written to {str(folder)!r} ({error.strerror}); make room") from error
            raise
        self._cache.adopt((slot, page.place, page.key) for slot, page in reversed(placed.items()))

    def _has(self, digest: bytes) -> bool:
        return self._cache.index.has(digest)

    def _touch(self, pages: list[ImportedPage]) -> None:
        """Makes those that are there the ones used last, each after those that follow it."""
        self._cache.touch([found for page in pages for found in self._cache.index.longest([page.key])])
