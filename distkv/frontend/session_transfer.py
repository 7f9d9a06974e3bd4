"""Sessions on their way to another cache folder: their content, the tokens of their pages, and taking them in."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from distkv.errors import ConfigError, StoreError
from distkv.frontend.session import FORMAT, Session, SessionFile, SessionLock, load_session, save_session
from distkv.frontend.session_limits import RESPONSE_ID, SessionLimits
from distkv.frontend.tokenizer import Tokenizer
from distkv.option_checks import check_name
from distkv.storage.disk.cache_folder import SESSIONS
from distkv.values import quoted

ANY_QUESTION = {"role": "user", "content": "?"}


def read_session(cache_dir: Path, name: str, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[int]]:
    """The content of a session's file, and the tokens of a prompt that goes on with it: those of any such prompt, but
    for the last ones. Raises ConfigError when there is none, and as `Session` and `Session.prompt` do."""
    path = cache_dir / SESSIONS / f"{check_name('session', name)}.json"
    if not path.exists():
        raise ConfigError(f"there is no session {name} in {str(cache_dir)!r}; name one that has been begun")
    with Session(cache_dir, name) as session:
        content: dict[str, Any] = msgspec.to_builtins(load_session(path))
        return content, session.prompt(tokenizer, [ANY_QUESTION])


class ComingSessions:
    """Sessions that are to be taken in, locked in the meantime. A context manager."""

    def __init__(self, cache_dir: Path, sessions: Mapping[str, Any], limits: SessionLimits | None = None):
        """Raises ConfigError when a name cannot be one, or is that of another session there or of one that is open,
        CapacityError for more or larger ones than there may be, StoreError when the content is none of a session."""
        limits = limits or SessionLimits()
        coming = {cache_dir / SESSIONS / f"{name}.json": _content(name, content) for name, content in sessions.items()}
        limits.check_number(*coming)
        self._new: dict[Path, bytes] = {}
        with ExitStack() as stack:
            for path, content in coming.items():
                encoded = msgspec.json.encode(content)
                limits.check_size(path.stem, len(encoded))
                stack.callback(SessionLock(path).release)
                found = load_session(path)
                if found.messages and found != content:
                    raise ConfigError(
                        f"there is another session {path.stem}; move {str(path)!r} away, or keep that one"
                    )
                if found != content:
                    self._new[path] = encoded
            self._locks = stack.pop_all()

    def __enter__(self) -> "ComingSessions":
        return self

    def __exit__(self, *exception: object) -> None:
        self._locks.close()

    def save(self) -> None:
        """Writes them. Raises StoreError when one cannot be written, and none of them stays."""
        with ExitStack() as undo:
            for path, content in self._new.items():
                undo.callback(_remove, path)
                save_session(path, content)
            undo.pop_all()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _content(name: str, content: Any) -> SessionFile:
    """What a file of ours is to have of a session. Raises ConfigError and StoreError as `ComingSessions` does."""
    if RESPONSE_ID.fullmatch(check_name("session", name)):
        raise ConfigError(f"session {name} has the name of a server's response; leave it out of the file")
    try:
        found = msgspec.convert(content, SessionFile)
    except msgspec.ValidationError as error:
        raise StoreError(f"session {name} is damaged ({quoted(error)}); export it again") from error
    if found.version != FORMAT:
        raise ConfigError(f"session {name} has version {found.version} and this distkv reads {FORMAT}")
    return found
