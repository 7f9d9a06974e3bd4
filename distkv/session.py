"""Conversations that go on after a restart.

cache_dir/sessions/NAME.json   the messages, with the tokens that the model drew for its answers
cache_dir/sessions/NAME.lock   names the process that has the session open, and is locked by it
"""

import fcntl
import logging
import os
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated

import msgspec

from distkv.errors import ConfigError, DistKVError, RequestError, StoreError
from distkv.tokenizer import Message, Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class StoredMessage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A message; `token_ids` are what the model drew for it, without the end token."""

    role: str
    content: str
    token_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None


class FileVersion(msgspec.Struct):
    """What the file of any version says of itself."""

    version: int


class SessionFile(msgspec.Struct, forbid_unknown_fields=True):
    """Content of a session's file."""

    version: int
    tokenizer: str  # fingerprint of the one that the tokens belong to
    messages: list[StoredMessage]


class Session:
    """A named conversation in a cache folder, held by one process at a time. Use it as a context manager, or call
    `close()`.

    Answers are kept as the tokens that were drawn, so that each prompt repeats those of the turn before and finds their
    KV pages, even where the text of an answer would be encoded otherwise.

    Example:
        with Session(cache_dir, "planning") as session:
            prompt = session.prompt(llm.tokenizer, [{"role": "user", "content": "Where were we?"}])
            ...
            session.add_answer(text, token_ids)
    """

    def __init__(self, cache_dir: str | Path, name: str):
        """Opens the session, or begins it; nothing is written before the first answer.

        Raises ConfigError when the name cannot be one, when another process has the session open, and when its file is
        damaged or cannot be read.
        """
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise ConfigError(
                f"session is {name!r}; use up to 64 letters, digits and '-', '_' or '.', with no dot at the beginning"
            )
        folder = Path(cache_dir) / "sessions"
        self.name = name
        self._path = folder / f"{name}.json"
        self._asked: list[StoredMessage] | None = None  # messages that wait for an answer
        self._lock = _lock(folder / f"{name}.lock", name)
        try:
            self._file = _load(self._path)
        except ConfigError:
            self._lock.close()
            raise

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; answers have `token_ids`, as `Tokenizer.encode_chat` takes them."""
        return [msgspec.to_builtins(message) for message in self._file.messages]

    def prompt(self, tokenizer: Tokenizer, new_messages: list[Message]) -> list[int]:
        """Tokens of the conversation and the new messages, up to where the assistant answers.

        They begin with the last prompt, the tokens of its answer and the end token, where the chat template allows. The
        system message of the session may be given again. With another tokenizer than before, earlier answers are
        encoded from their text. The new messages become part of the session with their answer; until then another
        prompt takes the place of this one.

        Raises RequestError for messages that are malformed or have another system message than the session, and as
        `Tokenizer.encode_chat` does.
        """
        self._asked = None
        asked = self._new(new_messages)
        if self._file.tokenizer != tokenizer.fingerprint:
            if self._file.messages:
                log.warning(
                    "session %s was written with another tokenizer; its answers are encoded from their text", self.name
                )
            for message in self._file.messages:
                message.token_ids = None
            self._file.tokenizer = tokenizer.fingerprint
        token_ids = tokenizer.encode_chat([*self.messages, *map(msgspec.to_builtins, asked)])
        self._asked = asked
        return token_ids

    def add_answer(self, text: str, token_ids: list[int]) -> None:
        """Adds the last prompt's messages and the answer to them, and saves the session.

        Args:
            text: of the answer, finished or not.
            token_ids: what the model drew for it, without the end token.

        Raises StoreError, and adds nothing, when the file cannot be written.
        """
        if self._lock.closed:
            raise DistKVError(f"session {self.name} is closed; open it again")
        if self._asked is None:
            raise DistKVError(f"session {self.name} has no prompt without an answer; call prompt() first")
        answer = StoredMessage("assistant", text, list(token_ids))
        grown = SessionFile(FORMAT, self._file.tokenizer, [*self._file.messages, *self._asked, answer])
        _save(self._path, grown)
        self._file, self._asked = grown, None

    def close(self) -> None:
        """Lets others open the session. A second call does nothing."""
        self._lock.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new(self, messages: list[Message]) -> list[StoredMessage]:
        """The messages of a turn, checked, without the system message that the session began with."""
        try:
            new = msgspec.convert(messages, list[StoredMessage])
        except msgspec.ValidationError as error:
            raise RequestError(
                f"a session takes messages such as {{'role': 'user', 'content': 'Hello'}}, of text alone: {error}"
            ) from None
        if self._file.messages and new and new[0].role == "system":
            if new[0] != self._file.messages[0]:
                raise RequestError(
                    f"session {self.name} did not begin with this system message; leave it out, or begin a session "
                    "under another name"
                )
            return new[1:]
        return new


def _lock(path: Path, name: str) -> IO[str]:
    """Locks the file for as long as it is open. Raises ConfigError when it cannot be written or is locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"session {name} cannot be kept in {str(path.parent)!r} ({error.strerror}); name a cache_dir that can be "
            "written"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"session {name} is open in {holder}; end that, or name another session") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _load(path: Path) -> SessionFile:
    """The content of a session's file, or of a new session when there is none. Raises ConfigError for a damaged one."""
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
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"session file {str(path)!r} is damaged ({error}); {cure}") from error
    raise ConfigError(
        f"session file {str(path)!r} has version {version} and this distkv reads version {FORMAT}; update distkv, or "
        "name another session"
    )


def _save(path: Path, content: SessionFile) -> None:
    """Replaces the file, which is the old one or the new one whatever happens; raises StoreError when it cannot."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(msgspec.json.encode(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(
            f"session file {str(path)!r} cannot be written ({error.strerror}); make room for it or let it be written"
        ) from error
