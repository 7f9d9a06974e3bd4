"""Whether the disk takes pages: one that has refused some is left alone for a while."""

WRITE_RETRY = 256  # steps after which a disk that refused a page is tried again
MAX_REFUSALS = 3  # of the disk in a row, after which idle pages there are not given up for room


class DiskRefusals:
    """`refuse` pauses writes to disk, until `lift` or WRITE_RETRY calls of `count_step`.

    `accept` ends a row of refusals.
    """

    def __init__(self) -> None:
        self._steps_left = 0
        self._reason = ""  # of the last one
        self._in_a_row = 0

    @property
    def paused(self) -> bool:
        """Whether nothing is to be written."""
        return self._steps_left > 0

    @property
    def too_many(self) -> bool:
        """Whether room on the disk has been tried so often that it does not help."""
        return self._in_a_row >= MAX_REFUSALS

    @property
    def remark(self) -> str:
        """Why the disk takes no more pages, for the end of a sentence; empty when it does."""
        return f" (the disk refuses more: {self._reason})" if self.paused else ""

    def refuse(self, reason: str) -> None:
        """The disk did not take a page."""
        self._steps_left, self._reason = WRITE_RETRY, reason
        self._in_a_row += 1

    def accept(self) -> None:
        """The disk took a page."""
        self._in_a_row = 0

    def lift(self) -> None:
        """Ends the pause before its time."""
        self._steps_left = 0

    def count_step(self) -> None:
        """A step of the pause has passed."""
        self._steps_left = max(0, self._steps_left - 1)
