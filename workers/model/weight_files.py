"""The files of a checkpoint as a rank has opened them, and digests by which ranks and caches know what was read.

A path may name another file at any moment, here or on another node, so all is asked of the open files and after they
were read: whoever put what in their place before or since, a digest is of the weights that compute. What a start has
found is kept in the checkpoint's folder, in DIGESTS, until a file's size or time of change differs.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch

from distkv.storage.disk.files import replace_file
from distkv.workers.errors import ConfigError

log = logging.getLogger(__name__)

DIGESTS = ".distkv-fingerprint.json"
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a checkpoint, where ranks alone are compared
FILE_SAMPLES = 64  # of a file, to see whether it has changed


class WeightFile:
    """A file that stays open, and the state in which it was opened."""

    def __init__(self, path: Path):
        """Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._opened = os.fstat(self._descriptor)
        try:
            self._sampled = self.sample(FILE_SAMPLES)
        except OSError:
            self.close()
            raise

    @property
    def link(self) -> str:
        """A path of this very file, whatever lies at `path` by now."""
        return f"/proc/self/fd/{self._descriptor}"

    @property
    def key(self) -> dict[str, int]:
        """What differs when the content does; a file put in another's place may keep its size and time, but is another
        file or was changed now."""
        status = self._opened
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}

    def close(self) -> None:
        os.close(self._descriptor)

    def check(self) -> None:
        """Raises ConfigError when the content has changed since it was opened. The time of change alone differs too
        when the file lost a name or got other rights; then samples tell."""
        before, now = self._opened, os.fstat(self._descriptor)
        is_same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not is_same or (now.st_ctime_ns != before.st_ctime_ns and self.sample(FILE_SAMPLES) != self._sampled):
            raise ConfigError(f"{str(self.path)!r} was changed while it was read; start again when it is written")

    def digest(self) -> str:
        """64 hex digits of the content."""
        log.info("reading %s once, to name the cache of its pages", self.path)
        with open(self.link, "rb") as file:
            return file_digest(file, "sha256").hexdigest()

    def sample(self, count: int) -> str:
        """64 hex digits of size, header and `count` pieces, for which little is read."""
        size = self._opened.st_size
        pieces = sha256(str(size).encode())
        for index in range(count):
            pieces.update(os.pread(self._descriptor, SAMPLE_BYTES, index * size // count))
        return pieces.hexdigest()


def weights_digest(folder: Path, files: Mapping[str, WeightFile], file_of: Mapping[str, str]) -> str:
    """64 hex digits of the content of a checkpoint's files, and of which tensor is read from which.

    Args:
        files: by name.
        file_of: the name of each tensor's file.

    Raises ConfigError when a file cannot be read.
    """
    path = folder / DIGESTS
    known = _read_digests(path)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        found = dict(zip(files, threads.map(lambda name: _find(files[name], known.get(name, {})), files), strict=True))
    if found != known:
        try:
            replace_file(path, json.dumps(found, indent=1).encode())
        except OSError as error:
            log.warning("%s cannot be written (%s), so the weights are read once more at each start", path, error)
    return _digest({name: one["sha256"] for name, one in found.items()}, file_of)


def sample_digest(files: Mapping[str, WeightFile], file_of: Mapping[str, str]) -> str:
    """As good as `weights_digest` to tell a model from its relatives, and quick; not to keep anything by."""
    count = max(1, SAMPLES // len(files))
    return _digest({name: file.sample(count) for name, file in files.items()}, file_of)


def _find(file: WeightFile, before: dict[str, Any]) -> dict[str, Any]:
    """The digest of a file with its key; what an earlier start has found, where nothing has changed."""
    if {field: before.get(field) for field in file.key} == file.key and isinstance(before.get("sha256"), str):
        return before
    try:
        return file.key | {"sha256": file.digest()}
    except OSError as error:
        raise ConfigError(f"{str(file.path)!r} cannot be read ({error.strerror}): fetch it again") from error


def _digest(contents: dict[str, str], file_of: Mapping[str, str]) -> str:
    """Of what is read under which name; the names of files have no part in it."""
    return sha256(json.dumps(sorted((tensor, contents[file]) for tensor, file in file_of.items())).encode()).hexdigest()


def _read_digests(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier start found, by file; nothing when that cannot be read."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
        return {}
    return known
