"""Tells ranks that hang from ranks that take long."""

import time

LOOK_SECONDS = 1.0  # that a look counts for at most


class Watchdog:
    """Adds up for how long nothing has come of ranks that have something to do.

    What they take at most is not known, but what they took so far is: they hang when nothing has come for `patience`
    seconds longer than ever before. A look counts for a second at most, so that who was stopped itself blames nobody.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self.longest = 0.0  # silence so far that something has ended, in seconds
        self.begin()

    def begin(self) -> None:
        """The ranks have been given something to do, and had nothing before."""
        self.silence = 0.0  # seconds
        self._looked = time.monotonic()

    def heard(self) -> None:
        """Something has come of it."""
        self.longest = max(self.longest, self.silence)
        self.begin()

    def is_hung(self) -> bool:
        """Looks again, which is to be done every now and then while nothing comes."""
        now = time.monotonic()
        self.silence += min(now - self._looked, LOOK_SECONDS)
        self._looked = now
        return self.silence > self._patience + self.longest
