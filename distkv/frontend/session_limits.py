"""How many sessions a cache folder may hold, and how large their files may become."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from distkv.config import EngineConfig
from distkv.errors import CapacityError, StoreError

RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
"""Names of sessions in which a server keeps responses; it has a limit of its own for these."""


@dataclass(frozen=True)
class SessionLimits:
    """None is for no limit.

    Args:
        most: see `EngineConfig.max_sessions`.
        most_bytes: see `EngineConfig.max_session_bytes`.
    """

    most: int | None = None
    most_bytes: int | None = None

    @classmethod
    def of(cls, config: EngineConfig) -> "SessionLimits":
        """Those of an engine's cache folder."""
        most_bytes = config.max_session_bytes
        return cls(config.max_sessions, None if most_bytes is None else int(most_bytes))

    def check_number(self, *paths: Path) -> None:
        """Raises CapacityError where files of sessions, all in one folder, would be too many."""
        new = [path for path in paths if not (RESPONSE_ID.fullmatch(path.stem) or os.path.exists(path))]
        if self.most is None or not new:
            return
        folder = new[0].parent
        if (num_there := _count(folder)) + len(new) > self.most:
            one, many = f"session {new[0].stem} would be a new one", f"{len(new)} sessions would be new ones"
            raise CapacityError(
                f"{one if len(new) == 1 else many}, and {str(folder)!r} holds {num_there} of the {self.most} that "
                "max_sessions allows; go on with one of them, remove files of sessions that nobody wants, or raise "
                "max_sessions (--max-sessions)"
            )

    def check_size(self, name: str, size: int) -> None:
        """Raises CapacityError for a file of more bytes than there may be."""
        if self.most_bytes is not None and size > self.most_bytes:
            raise CapacityError(
                f"session {name} would take {size} bytes, and max_session_bytes is {self.most_bytes}; begin another "
                "session, or raise it (--max-session-bytes)"
            )

    def check_file(self, path: Path, size: int) -> None:
        """Raises StoreError where `path` must not be written with so many bytes."""
        try:
            self.check_number(path)
            self.check_size(path.stem, size)
        except CapacityError as error:
            raise StoreError(str(error)) from None


def _count(folder: Path) -> int:
    """Sessions in a folder, if it can be read; who writes there is told if it cannot."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json")]
    except OSError:
        return 0
    return sum(RESPONSE_ID.fullmatch(name) is None for name in names)
