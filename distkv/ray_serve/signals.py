"""How `distkv serve --replicas` takes signals."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """The first SIGTERM or SIGINT has what runs end by itself, the second leaves that to Serve."""

    def __init__(self) -> None:
        self.num_come = 0
        self.is_interrupted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles signals for as long as this lasts."""
        before = self.handle()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self) -> dict[int, Any]:
        """Begins to handle them, or begins again when Ray has put a handler of its own in place, which aborts the
        process three seconds after SIGTERM."""
        return {number: signal.signal(number, self._handle) for number in SIGNALS}

    def sleep(self, seconds: float) -> None:
        """Sleeps, but no longer than until the next signal."""
        num_before, end = self.num_come, time.monotonic() + seconds
        while self.num_come == num_before and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _handle(self, number: int, _: FrameType | None) -> None:
        signal.alarm(0)  # which Ray's handler sets, if it was there
        self.num_come += 1
        self.is_interrupted |= number == signal.SIGINT
