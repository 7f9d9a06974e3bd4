"""Tells rank 0, which waits for later stages, that they go on: a rank that does says so once a second in the store of
the group, while it has begun more sums or received more from the stage before."""

import threading
from collections.abc import Callable

import torch.distributed as dist

SECONDS = 1.0
_KEY = "stages go on"


class StagePulse:
    """Of a rank behind the first stage, until it is closed."""

    def __init__(self, store: dist.Store, progress: Callable[[], int]):
        """
        Args:
            progress: a number that rises while the rank goes on.
        """
        self._store, self._progress = store, progress
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="distkv-pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        seen = 0
        while not self._closed.wait(SECONDS):
            last, seen = seen, self._progress()
            if seen != last:
                try:
                    self._store.add(_KEY, 1)
                except dist.DistError:  # rank 0 is gone, and so soon this one
                    return

    def close(self) -> None:
        """Ends it."""
        self._closed.set()
        self._thread.join()


def num_beats(store: dist.Store) -> int:
    """Of all ranks so far."""
    return store.add(_KEY, 0)
