"""How many answers may wait for their turn: whoever asks for more is refused at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from distkv.errors import CapacityError, QueueFull


class RequestQueue:
    """Counts the answers of one caller of an engine, or of several engines, from the moment they are asked for until
    they have ended. For use by several threads.

    It stands before the engines, so a request that goes on elsewhere, since its engine was lost, is never refused.
    """

    def __init__(self, most: int | None, num_running: int):
        """
        Args:
            most: answers that may wait; None for any number.
            num_running: answers that run at a time.
        """
        self._most, self._num_running = most, num_running
        self.num_open = 0  # answers
        self._lock = threading.Lock()
        self.num_refused = 0  # answers

    def check(self, count: int) -> None:
        """Raises CapacityError for more answers at once than ever have a place."""
        if self._most is not None and count > self._num_running + self._most:
            raise CapacityError(
                f"{count} answers are asked for at once, and {self._num_running + self._most} can run and wait; ask "
                "for them in several requests, or raise max_queued_requests (--max-queued-requests)"
            )

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Lets so many answers in, for as long as this lasts; raises QueueFull when they would be too many, and
        CapacityError as `check` does."""
        self.check(count)
        with self._lock:
            places = None if self._most is None else self._num_running + self._most - self.num_open
            if places is not None and count > places:
                self.num_refused += count
                raise QueueFull(
                    f"{max(0, self.num_open - self._num_running)} answers wait for their turn, and "
                    f"max_queued_requests is {self._most}; try again later, or raise it (--max-queued-requests)"
                )
            self.num_open += count
        try:
            yield
        finally:
            with self._lock:
                self.num_open -= count
