"""Sessions of a file are taken in all together, or none of them is."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from distkv.errors import CapacityError, ConfigError, StoreError
from distkv.frontend.conversation import StoredMessage
from distkv.frontend.session import Session
from distkv.frontend.session_limits import SessionLimits
from distkv.frontend.session_transfer import ComingSessions


def coming(*names: str) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {name: {"version": 1, "tokenizer": "", "messages": [message]} for name in names}


def files(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.glob("sessions/*"))


def begin(cache_dir: Path, name: str, text: str) -> None:
    with Session(cache_dir, name) as session:
        session._messages = [StoredMessage("user", text)]
        session.save()


def test_all_new_ones_have_to_find_room(tmp_path: Path) -> None:
    begin(tmp_path, "a", "Hello")
    with pytest.raises(CapacityError, match=r"2 sessions would be new ones, and .* holds 1 of the 2 that max_sessions"):
        ComingSessions(tmp_path, coming("a", "b", "c"), SessionLimits(most=2))
    assert files(tmp_path) == ["a.json", "a.lock"]
    with ComingSessions(tmp_path, coming("a", "b"), SessionLimits(most=2)) as sessions:
        sessions.save()
    assert files(tmp_path) == ["a.json", "a.lock", "b.json", "b.lock"]


def test_one_that_cannot_be_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one that was there before."""
    replace, replaced = os.replace, []

    def full(old: Path, new: Path) -> None:
        replaced.append(new.stem)
        if len(replaced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(old, new)

    begin(tmp_path, "a", "Hello")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left"), ComingSessions(tmp_path, coming(*"abcd")) as sessions:
        sessions.save()
    assert replaced == ["b", "c"] and files(tmp_path) == ["a.json", "a.lock"]


def test_one_that_is_in_the_way_leaves_none(tmp_path: Path) -> None:
    begin(tmp_path, "b", "Good morning")
    with pytest.raises(ConfigError, match="there is another session b; move"):
        ComingSessions(tmp_path, coming("a", "b"))
    assert files(tmp_path) == ["b.json", "b.lock"]
