"""SIGINT and SIGTERM during a batch: the first has it end in good order, the second at once."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """What a batch knows of signals."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.is_gentle = False  # whether the first signal only sets `asked`; before there is work it cancels
        self.signal: signal.Signals | None = None  # the first one

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handles signals for the task that this runs in, for as long as it lasts; a third signal ends the process."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def handle(number: signal.Signals) -> None:
            signal.alarm(0)  # by which Ray's own handler aborts the process three seconds after SIGTERM
            is_first, self.signal = self.signal is None, self.signal or number
            self.asked.set()
            if not (is_first and self.is_gentle):
                task.cancel()
            if not is_first:
                for each in SIGNALS:
                    loop.remove_signal_handler(each)

        for number in SIGNALS:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
