"""Conversations that go on after a restart.

cache_dir/sessions/NAME.json   the messages, with the tokens that the model sampled for its answers
cache_dir/sessions/NAME.lock   names the process that has the session open, and is locked by it; it goes with the last
                               holder of a session that has no file

Nobody but their owner may read them.
"""

import logging
import os
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import msgspec

from distkv.errors import ConfigError, DistKVError, StoreError
from distkv.frontend.conversation import Conversation, StoredMessage, Turn
from distkv.frontend.session_limits import SessionLimits
from distkv.option_checks import check_name
from distkv.outputs import RequestOutput
from distkv.storage.disk.cache_folder import SESSIONS
from distkv.storage.disk.file_lock import FileLock, HeldError
from distkv.storage.disk.files import make_folder, sync_folder

log = logging.getLogger(__name__)

FORMAT = 1


class DamagedSessionError(ConfigError):
    """The file of a session is no such file, or no more."""


class FileVersion(msgspec.Struct):
    """What the file of any version says of itself."""

    version: int


class SessionFile(msgspec.Struct, forbid_unknown_fields=True):
    """Content of a session's file."""

    version: int
    tokenizer: str  # fingerprint of the one that the tokens belong to
    messages: list[StoredMessage]


class Session(Conversation):
    """A named conversation in a cache folder, held by one process at a time. Use it as a context manager, or call
    `close()`.

    Example:
        with Session(cache_dir, "planning") as session:
            prompt = session.prompt(llm.tokenizer, [{"role": "user", "content": "Where were we?"}])
            ...
            session.add_answer(text, token_ids)
    """

    def __init__(self, cache_dir: str | Path, name: str, limits: SessionLimits | None = None):
        """Opens the session, or begins it; nothing is written before the first answer.

        Raises ConfigError when the name cannot be one, when another process has the session open, and when its file is
        damaged or cannot be read; CapacityError when it would be one session too many.
        """
        check_name("session", name)
        self.name = name
        self.title = f"session {name}"
        self._path = Path(cache_dir) / SESSIONS / f"{name}.json"
        self._limits = limits or SessionLimits()
        self._limits.check_number(self._path)
        self._lock = SessionLock(self._path)
        try:
            found = load_session(self._path)
        except ConfigError:
            self._lock.release()
            raise
        super().__init__(found.messages, found.tokenizer)

    def close(self) -> None:
        """Lets others open the session. A second call does nothing."""
        self._lock.release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep(self, output: RequestOutput) -> RequestOutput:
        """Adds the answer of an output, and returns the output: with the StoreError as its `error`, and a warning, when
        the answer could not be written and the session is as it was before the question."""
        try:
            self.add_output(output.outputs[0])
        except StoreError as error:
            log.warning("the last turn is not kept: %s", error)
            return replace(output, error=error)
        return output

    def _check_turn(self, turn: Turn) -> None:
        """Raises CapacityError where even an empty answer would make the file too large."""
        if self._limits.most_bytes is not None:
            grown = [*self._messages, *turn.asked, StoredMessage("assistant", "", [])]
            self._limits.check_size(self.name, len(self._encoded(grown)))

    def _save(self, messages: list[StoredMessage]) -> None:
        """Writes the file, so that `add_answer` raises StoreError, and adds nothing, when that fails."""
        if not self._lock.is_held:
            raise DistKVError(f"session {self.name} is closed; open it again")
        content = self._encoded(messages)
        self._limits.check_file(self._path, len(content))
        save_session(self._path, content)

    def _encoded(self, messages: list[StoredMessage]) -> bytes:
        return msgspec.json.encode(SessionFile(FORMAT, self._tokenizer, messages))


class SessionLock(FileLock):
    """The right to a session. Its file stays beside that of the session alone, or those of names which never come again
    would pile up."""

    def __init__(self, session: Path):
        """Takes it, by the path of the session's file. Raises ConfigError when it cannot be written or is locked."""
        self._session, path, name = session, session.with_suffix(".lock"), session.stem
        try:
            make_folder(path.parent, 0o700)
            _make_private(path.parent, 0o700)
            super().__init__(path, mode=0o600)
            try:
                _make_private(self._file.fileno(), 0o600)
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise ConfigError(
                f"session {name} cannot be kept in {str(path.parent)!r} ({error.strerror}); name a cache_dir that can "
                "be written"
            ) from error
        except HeldError as holder:
            raise ConfigError(f"session {name} is open in {holder}; end that, or name another session") from None

    def release(self, removes: bool = False) -> None:
        """See `FileLock`."""
        super().release(removes or not os.path.exists(self._session))


def _make_private(place: Path | int, mode: int) -> None:
    """Has a folder or an open file of ours, which an earlier release may have made, be nobody else's to read."""
    found = os.stat(place)
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
        os.chmod(place, mode)


def read_conversation(path: Path) -> Conversation:
    """What a session's file has now, an empty conversation when there is none; without a lock, as the file is whole at
    any time. Raises as `load_session` does."""
    found = load_session(path)
    return Conversation(found.messages, found.tokenizer)


def load_session(path: Path) -> SessionFile:
    """The content of a session's file, or of a new session when there is none. Raises DamagedSessionError for a damaged
    one, and ConfigError for one that cannot be read or is of a later version."""
    cure = "move it away to begin the session anew, or bring back a copy of it"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return SessionFile(FORMAT, "", [])
    except OSError as error:
        raise ConfigError(f"session file {str(path)!r} cannot be read ({error.strerror}); {cure}") from error
    try:
        version = msgspec.json.decode(content, type=FileVersion).version
        if version == FORMAT:
            return msgspec.json.decode(content, type=SessionFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedSessionError(f"session file {str(path)!r} is damaged ({error}); {cure}") from error
    raise ConfigError(
        f"session file {str(path)!r} has version {version} and this distkv reads version {FORMAT}; update distkv, or "
        "name another session"
    )


def save_session(path: Path, content: bytes) -> None:
    """Replaces the file, which is the old one or the new one whatever happens, and the new one once this returns, power
    or no power. Raises StoreError when it cannot, and leaves nothing else then."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            os.fchmod(file.fileno(), 0o600)  # it may be left from a process that was killed
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"session file {str(path)!r} cannot be written ({error.strerror}); make room for it or let it be written"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
