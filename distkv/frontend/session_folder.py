"""The sessions in a cache_dir: whether their files can be read."""

from collections.abc import Iterator
from pathlib import Path

from distkv.errors import ConfigError
from distkv.frontend.session import DamagedSessionError, load_session, lock_session
from distkv.storage.disk.cache_folder import DAMAGED, SESSIONS


def verify_sessions(cache_dir: Path, repair: bool) -> list[str]:
    """What is wrong with the sessions that nobody has open.

    Args:
        repair: what cannot be read is renamed, so that its owner may look at it and a session of that name begins anew;
            what a kill left of a write is removed. The file of a later version of distkv stays as it is.
    """
    return [problem for name in _names(cache_dir / SESSIONS) for problem in _verify(cache_dir / SESSIONS, name, repair)]


def _names(folder: Path) -> list[str]:
    files = (path.name.removesuffix(".partial") for path in folder.glob("*.json*"))
    return sorted({name.removesuffix(".json") for name in files if name.endswith(".json")})


def _verify(folder: Path, name: str, repair: bool) -> Iterator[str]:
    path, partial = folder / f"{name}.json", folder / f"{name}.json.partial"
    try:
        lock = lock_session(folder / f"{name}.lock", name)
    except ConfigError:  # it is open, or another user's
        return
    try:
        if partial.exists():
            yield f"{partial} is what a kill left of a write"
            if repair:
                partial.unlink()
        try:
            load_session(path)
        except DamagedSessionError as error:
            yield str(error)
            if repair:
                path.replace(path.with_name(path.name + DAMAGED))
        except ConfigError as error:
            yield str(error)
    finally:
        lock.release()
