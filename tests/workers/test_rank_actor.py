"""A rank's actor, without Ray."""

import errno
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest

from distkv.storage.errors import StoreError
from distkv.workers.group import rank_actor
from distkv.workers.group.rank_actor import RankActor


def test_what_ended_the_engine_is_told_though_the_rank_cannot_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when followers write pages to the folder that rank 0 empties."""

    def close_after_error() -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "kv.zarr")

    def main(*_: Any) -> None:
        raise StoreError("the disk is gone")

    actor: Any = RankActor()
    logging.getLogger("distkv").removeHandler(actor._log)
    actor._loaded = SimpleNamespace(close_after_error=close_after_error)
    actor._followers = actor._requests = None
    monkeypatch.setattr(rank_actor, "RankExecutor", SimpleNamespace(on=lambda *_: None))
    with pytest.raises(StoreError, match="the disk is gone") as caught:
        actor.lead(main, ())
    [note] = caught.value.__notes__
    assert "Directory not empty: 'kv.zarr'" in note
