"""Pages that a killed engine left in the scratch folder, where nobody will ever read them."""

import logging
from pathlib import Path
from uuid import uuid4

from distkv.storage.disk.cache_folder import SCRATCH, SWEEPER, FolderLock
from distkv.storage.disk.disk_array import remove_arrays
from distkv.storage.disk.removal import num_bytes
from distkv.storage.errors import ConfigError, DistKVError

log = logging.getLogger(__name__)


def sweep_scratch(cache_dir: Path) -> int:
    """Removes them, unless an engine uses the folder; returns their bytes."""
    folder = cache_dir / SCRATCH
    lock: FolderLock | None = None
    try:
        size = num_bytes(folder)
        if size:
            try:
                lock = FolderLock(folder, SWEEPER + uuid4().hex)
            except ConfigError:
                return 0
            remove_arrays(folder)
    except DistKVError as error:
        log.warning("%s is not swept: %s", folder, error)
        return 0
    finally:
        if lock is not None:
            lock.release()
    return size
