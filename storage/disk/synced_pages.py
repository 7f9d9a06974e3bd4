"""Has the pages of a folder outlive a loss of power, in batches, by a thread that nobody waits for.

`docs/durability.md` says what that promises and what it costs.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from distkv.storage.disk.cache_folder import CATALOGUE_LOG
from distkv.storage.disk.files import sync_file, sync_folder

log = logging.getLogger(__name__)

SYNC_SECONDS = 5.0  # between two batches


class SyncedPages:
    """Syncs the chunk files that a rank has written every SYNC_SECONDS, and once more at the end; with the leader's
    rank also the catalogue that lists them, whose rows come later than the files."""

    def __init__(self, folder: Path, has_catalogue: bool):
        """
        Args:
            folder: the model's.
            has_catalogue: whether the catalogue lies there.
        """
        self._folder = folder
        self._log = folder / CATALOGUE_LOG if has_catalogue else None
        self._log_state: tuple[int, int] | None = None  # size and time of change when it was synced last
        self._lock = threading.Lock()
        self._written: set[str] = set()  # since the last batch
        self._has_failed = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-sync", daemon=True)
        self._thread.start()

    def add(self, files: Iterable[str]) -> None:
        """Has files be synced with the next batch. Any thread may call it."""
        with self._lock:
            self._written.update(files)

    def close(self) -> None:
        """Syncs what is left. A second call does nothing."""
        if not self._end.is_set():
            self._end.set()
            self._thread.join()
            self.sync()

    def sync(self) -> None:
        """Syncs a batch, the files before their names, and these before the catalogue. A failure is logged: the pages
        are there, and each is checked when it is read."""
        with self._lock:
            written, self._written = self._written, set()
        failures = [self._try(sync_file, Path(file)) for file in written]
        if written:
            arrays = {Path(file).parent for file in written}
            failures += [self._try(sync_folder, folder) for folder in (*arrays, self._folder)]
        failures.append(self._try(self._sync_catalogue))
        reason = next(filter(None, failures), None)
        if reason is not None and not self._has_failed:
            log.warning(
                "%s cannot be synced (%s): a loss of power may take its last pages, which are computed again then",
                self._folder, reason,
            )  # fmt: skip
        self._has_failed = reason is not None

    @staticmethod
    def _try(sync: Callable[..., None], *arguments: Path) -> str | None:
        """Why something could not be synced; None when it was, or is gone, since its page was given up."""
        try:
            sync(*arguments)
        except FileNotFoundError:
            return None
        except OSError as error:
            return error.strerror
        return None

    def _run(self) -> None:
        while not self._end.wait(SYNC_SECONDS):
            self.sync()

    def _sync_catalogue(self) -> None:
        """SQLite, which syncs the file itself at checkpoints, has committed to its log alone. No lock lies on that, so
        it may be opened and closed beside SQLite."""
        if self._log is None:
            return
        found = self._log.stat()
        state = found.st_size, found.st_mtime_ns
        if state != self._log_state:
            sync_file(self._log)
            self._log_state = state
