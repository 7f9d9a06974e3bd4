"""What a command shows while it runs."""

from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.live import Live


class LiveView:
    """A context manager with a picture on a terminal, `_live`, which is None elsewhere: there lines are printed."""

    def __init__(self, console: Console, transient: bool = False):
        """`transient` takes the picture away at the end."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=transient) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            with suppress(OSError):
                self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            with suppress(OSError):  # a terminal that is gone
                self._live.stop()
