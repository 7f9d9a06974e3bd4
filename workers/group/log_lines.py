"""What ranks log, on its way to the process that owns them: nobody reads the log files of a Ray actor."""

import logging
from queue import Empty, SimpleQueue

LogLine = tuple[int, str, str]
"""Level, name of the logger, text."""


class LogCollector(logging.Handler):
    """Keeps what this process logs in distkv at WARNING and above, until it is taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: SimpleQueue[LogLine] = SimpleQueue()
        logging.getLogger("distkv").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put((record.levelno, record.name, self.format(record)))

    def take(self) -> list[LogLine]:
        """The lines since the last call."""
        lines: list[LogLine] = []
        try:
            while True:
                lines.append(self._lines.get_nowait())
        except Empty:
            return lines


def relay(lines: list[LogLine], rank: int = 0) -> None:
    """Logs lines of another process here, with the rank they come from. Rank 0's have no label: it is the engine's
    too, and has relayed lines of the others with theirs."""
    for level, name, text in lines:
        logging.getLogger(name).log(level, "%s", f"rank {rank}: {text}" if rank else text)
