"""Pages that a killed engine left in the scratch folder, where nobody will ever read them."""

import logging
from pathlib import Path

from distkv.storage.disk.cache_folder import SCRATCH, FolderLock
from distkv.storage.disk.disk_array import remove_array
from distkv.storage.disk.removal import num_bytes
from distkv.storage.errors import ConfigError

log = logging.getLogger(__name__)


def sweep_scratch(cache_dir: Path) -> int:
    """Removes them, unless an engine uses the folder; returns their bytes."""
    folder = cache_dir / SCRATCH
    size = num_bytes(folder)
    if not size:
        return 0
    try:
        lock = FolderLock(folder)
    except ConfigError:
        return 0
    try:
        remove_array(folder)
    except (ConfigError, OSError) as error:
        log.warning("%s is not swept: %s", folder, error)
        return 0
    finally:
        lock.release()
    return size
