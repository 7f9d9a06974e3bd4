"""At the client: fetches the files that a job has put out, checks them, and writes them where they are wanted."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from distkv.errors import ConfigError, StoreError
from distkv.jobs.cluster import Cluster
from distkv.jobs.outbox import MANIFEST, folder_name


def check_pattern(pattern: str) -> str:
    """The pattern. Raises ConfigError for one that could lead out of the job's folder, or that Python does not take."""
    if any("**" in part and part != "**" for part in _check_path(pattern).parts):
        raise ConfigError(
            f"--bring {pattern!r} has ** beside other letters; it stands for folders, alone between slashes"
        )
    return pattern


def _check_path(given: str) -> PurePosixPath:
    path = PurePosixPath(given)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ConfigError(
            f"--bring {given!r} is not a path inside the job's working dir; have the command write there, and name "
            "the file relative to it"
        )
    return path


def bring(cluster: Cluster, job: str, node: str, target: Path, tell: Callable[[str], None]) -> None:
    """Writes the files of a job that has ended below `target`, and tells of each, and of those that are not there.

    A file there that has changed since the job was submitted, by the clock of who did so and not by the cluster's, is
    left as it is, and the job's is put beside it. `node` is where the job's command ran. Raises StoreError for what
    does not arrive whole or cannot be written.
    """
    folder = folder_name(job)
    try:
        manifest = json.loads(cluster.log_file(node, f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        tell("the job has put no files out, so none are brought")
        return
    for pattern in manifest["missing"]:
        tell(f"the job did not write {pattern}")
    for entry in manifest["files"]:
        path = target / _check_path(entry["path"])
        content = cluster.log_file(node, f"{folder}/{entry['name']}")
        if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise StoreError(
                f"{entry['path']} did not arrive as the job wrote it ({len(content)} of {entry['size']} bytes); "
                f"fetch it again with distkv submit --follow {job}"
            )
        tell(_write(path, content, manifest.get("submitted", 0.0), job))


def _write(path: Path, content: bytes, since: float, job: str) -> str:
    """Puts a file in its place, whole or not at all; returns what is to be said."""
    try:
        note = ""
        if path.is_file() and path.read_bytes() == content:
            return f"{path.name} is here already"
        if path.exists() and (path.is_dir() or path.stat().st_mtime > since):
            note = f": {path.name} here is newer than the job, and is left as it is"
            path = path.with_name(f"{path.name}.{job}")
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            staged.write_bytes(content)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"{str(path)!r} cannot be written: {error.strerror}; fetch it again with distkv submit --follow {job}"
        ) from error
    return f"brought {os.path.relpath(path)} ({len(content)} bytes){note}"
