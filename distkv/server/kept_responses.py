"""Conversations that a later request may go on from, by the id of the response that they end in.

With a cache folder they are sessions there, which outlive the server; without one they are held in memory.
"""

from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from distkv.errors import StoreError
from distkv.frontend.conversation import Conversation
from distkv.frontend.session import Session
from distkv.frontend.session_limits import RESPONSE_ID, SessionLimits
from distkv.server.errors import ApiError
from distkv.server.service import Service
from distkv.storage.disk.cache_folder import SESSIONS
from distkv.storage.disk.file_lock import FileLock, HeldError


class KeptResponses:
    """The conversations, of which the oldest are dropped beyond `ServerOptions.max_stored_responses`."""

    def __init__(self, service: Service):
        self._service = service
        self._held: OrderedDict[str, Conversation] = OrderedDict()  # without a cache folder

    def begin(self, previous: str | None) -> Conversation:
        """A conversation that goes on from a response; raises ApiError when there is none of that id."""
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
            found = self._held.get(response_id)
            if cache_dir is not None and (cache_dir / SESSIONS / f"{response_id}.json").exists():
                with Session(cache_dir, response_id) as session:
                    found = session
            if found is not None and found.messages:  # there are none where the file was dropped in between
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
        lock = path.with_suffix(".lock")
        with suppress(HeldError):  # somebody reads it or drops it
            held = FileLock(lock)
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
            held.release()


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
