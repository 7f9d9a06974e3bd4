"""Conversations that a later request may go on from, by the id of the response that they end in.

With a cache folder they are sessions there, which outlive the server; without one they are held in memory.
"""

import logging
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from distkv.errors import StoreError
from distkv.frontend.conversation import Conversation
from distkv.frontend.session import Session, read_conversation
from distkv.frontend.session_limits import RESPONSE_ID, SessionLimits
from distkv.server.errors import ApiError
from distkv.server.service import Service
from distkv.storage.disk.cache_folder import SESSIONS
from distkv.storage.disk.file_lock import FileLock, HeldError

log = logging.getLogger(__name__)


class KeptResponses:
    """The conversations, of which the oldest are dropped beyond `ServerOptions.max_stored_responses`."""

    def __init__(self, service: Service):
        self._service = service
        self._held: OrderedDict[str, Conversation] = OrderedDict()  # without a cache folder
        self._lock = Lock()  # of it, as each answer ends in a thread of its own

    def begin(self, previous: str | None) -> Conversation:
        """A conversation that goes on from a response; reads a file. Raises ApiError when there is none of that id."""
        conversation = Conversation()
        if previous is not None:
            conversation.go_on_from(self._find(previous))
        return conversation

    def keep(self, response_id: str, conversation: Conversation) -> None:
        """Keeps a conversation that ends in an answer. Raises StoreError when it cannot be written, or must not be."""
        cache_dir, most = self._cache_dir, self._service.options.max_stored_responses
        if not most:
            raise StoreError("max_stored_responses is 0, so that no response can be gone on from; send store: false")
        if cache_dir is None:
            with self._lock:
                self._held[response_id] = conversation
                while len(self._held) > most:
                    self._held.popitem(last=False)
            return
        with Session(cache_dir, response_id, SessionLimits.of(self._service.llm.config)) as session:
            session.go_on_from(conversation)
            session.save()
        _drop_oldest(cache_dir / SESSIONS, most)

    def _find(self, response_id: str) -> Conversation:
        if RESPONSE_ID.fullmatch(response_id) is not None:
            cache_dir = self._cache_dir
            if cache_dir is None:
                found = self._held.get(response_id, Conversation())
            else:
                found = read_conversation(cache_dir / SESSIONS / f"{response_id}.json")
            if found.messages:
                return found
        raise ApiError(
            404, f"there is no response {response_id!r} to go on from; it was not stored, or has been dropped",
            "previous_response_id", "previous_response_not_found",
        )  # fmt: skip

    @property
    def _cache_dir(self) -> Path | None:
        found = self._service.llm.config.cache_dir
        return None if found is None else Path(found)


def _drop_oldest(folder: Path, most: int) -> None:
    """Removes the files of the oldest responses beyond so many; another thread may be at it as well."""
    found = [path for path in folder.glob("resp_*.json") if RESPONSE_ID.fullmatch(path.stem)]
    if len(found) <= most:
        return
    for path in sorted(found, key=_age, reverse=True)[: len(found) - most]:
        try:
            _drop(path)
        except OSError as error:  # which is no reason to lose the answer that has just been kept
            log.warning("%r is not dropped (%s); let it be removed", str(path), error.strerror)


def _drop(path: Path) -> None:
    try:
        lock = FileLock(path.with_suffix(".lock"))
    except HeldError:  # somebody has it open or drops it
        return
    try:
        path.unlink(missing_ok=True)
    finally:
        lock.release(removes=True)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
