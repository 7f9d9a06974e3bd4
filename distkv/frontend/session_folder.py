"""The sessions in a cache_dir: whether their files can be read."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from distkv.errors import ConfigError
from distkv.frontend.session import DamagedSessionError, SessionLock, load_session
from distkv.storage.disk.cache_folder import DAMAGED, SESSIONS


def verify_sessions(cache_dir: Path, repair: bool) -> list[str]:
    """What is wrong with the sessions.

    Args:
        repair: mend those that nobody has open. What cannot be read is renamed, so that its owner may look at it and a
            session of that name begins anew; what a kill left of a write is removed. The file of a later version of
            distkv stays as it is.
    """
    return [problem for name in _names(cache_dir / SESSIONS) for problem in _verify(cache_dir / SESSIONS, name, repair)]


def _names(folder: Path) -> list[str]:
    files = (path.name.removesuffix(".partial") for path in folder.glob("*.json*"))
    return sorted({name.removesuffix(".json") for name in files if name.endswith(".json")})


def _verify(folder: Path, name: str, repair: bool) -> Iterator[str]:
    path, partial = folder / f"{name}.json", folder / f"{name}.json.partial"
    with ExitStack() as stack:
        try:
            stack.callback(SessionLock(path).release)
            is_ours = True
        except ConfigError:  # it is open, or another user's, or nobody may write there
            is_ours = False
        if is_ours and partial.exists():
            yield f"{partial} is what a kill left of a write"
            if repair:
                partial.unlink()
        try:
            load_session(path)  # whole at any time, as it is replaced and not changed
        except DamagedSessionError as error:
            yield str(error)
            if repair and is_ours:
                path.replace(path.with_name(path.name + DAMAGED))
        except ConfigError as error:
            if is_ours:
                yield str(error)
