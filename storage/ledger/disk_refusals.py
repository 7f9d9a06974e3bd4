"""Whether the disk takes more pages: one that has refused some is asked for no more for a while."""

WRITE_RETRY = 256  # steps after which a disk that refused a page is tried again
MAX_REFUSALS = 3  # in a row, though a page was given up for each


class DiskRefusals:
    """`refuse` begins a pause, in which the disk takes pages only in the room of others, until `lift` or WRITE_RETRY
    calls of `count_step`. `accept` ends a row of refusals of those too.
    """

    def __init__(self) -> None:
        self._steps_left = 0
        self._reason = ""  # of the last one
        self._in_a_row = 0

    @property
    def paused(self) -> bool:
        """Whether nothing is to be written without giving up room for it."""
        return self._steps_left > 0

    @property
    def hopeless(self) -> bool:
        """Whether nothing is to be written, since giving up room did not help."""
        return self.paused and self._in_a_row >= MAX_REFUSALS

    @property
    def remark(self) -> str:
        """Why the disk takes no more pages, for the end of a sentence; empty when it does."""
        return f" (the disk refuses more: {self._reason})" if self.paused else ""

    def refuse(self, reason: str, had_room: bool) -> None:
        """The disk did not take a page, though another was given up for it if it `had_room`."""
        self._steps_left, self._reason = WRITE_RETRY, reason
        self._in_a_row += had_room

    def accept(self) -> None:
        """The disk took a page."""
        self._in_a_row = 0

    def lift(self) -> None:
        """Ends the pause before its time."""
        self._steps_left = 0

    def count_step(self) -> None:
        """A step of the pause has passed."""
        self._steps_left = max(0, self._steps_left - 1)
