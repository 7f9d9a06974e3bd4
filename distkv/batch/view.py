"""What `distkv batch` shows while it runs: a bar on a terminal, else a line now and then."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from distkv.batch.files import BatchFiles
from distkv.batch.tally import Tally
from distkv.reporting.live_view import LiveView

LINE_SECONDS = 10.0
SHOW_SECONDS = 0.2  # between pictures on a terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich's own ends the process."""
        raise  # the OSError that is being handled


class Report:
    """Tells on stderr how it goes. That nobody can be told ends no batch."""

    def __init__(self, tally: Tally, files: BatchFiles):
        self.tally = tally
        self._console, self._files = _Console(stderr=True, highlight=False), files
        self._view: BatchView | None = None
        self._state = ""

    def say(self, text: str) -> None:
        """Prints a line."""
        with suppress(OSError):
            self._console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Lets `show` show something for as long as this lasts; the time of the run counts from here."""
        self.tally.begin()
        with BatchView(self._console, self.tally) as view:
            self._view = view
            try:
                yield
            finally:
                self.show(now=True)
                self._view = None

    def note(self, state: str) -> None:
        """What is told beside the figures from now on, such as how many engines run."""
        self._state = state

    def show(self, now: bool = False) -> None:
        """Shows how far it is, if it is time for that, or `now`."""
        if self._view is not None:
            with suppress(OSError):
                self._view.show(self._state, now)

    def close(self) -> None:
        """Says what has come of it."""
        tally, files = self.tally, self._files
        told = f"{tally.num_answered} of {tally.num_lines} lines are answered in {files.output}"
        if tally.num_failed:
            told += f", {tally.num_failed} are in {files.errors} (--retry-errors tries them again)"
        if tally.num_done < tally.num_lines:
            told += f", {tally.num_lines - tally.num_done} are left: run the same command again to go on"
        if tally.num_run:
            rate, _ = tally.rates(whole=True)
            told += f"; {tally.num_run} in {tally.seconds:.1f} s, {rate:.3g} lines/s, {figures(tally, whole=True)}"
        self.say(told)


class BatchView(LiveView):
    """A context manager; `show` is to be called often."""

    def __init__(self, console: Console, tally: Tally):
        super().__init__(console)
        self._tally = tally
        self._shown = -math.inf  # monotonic seconds

    def show(self, state: str, now: bool = False) -> None:
        """As `Report.show`, with what is told beside the figures."""
        seconds = time.monotonic()
        if not now and seconds - self._shown < (LINE_SECONDS if self._live is None else SHOW_SECONDS):
            return
        self._shown = seconds
        self._tally.mark()
        if self._live is None:
            self._console.print(f"{progress(self._tally)}; {figures(self._tally, state)}", soft_wrap=True)
        else:
            self._live.update(self._picture(state), refresh=True)

    def _picture(self, state: str) -> RenderableType:
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._tally.num_lines, completed=self._tally.num_done, width=40)
        row.add_row(bar, progress(self._tally))
        return Group(row, figures(self._tally, state))


def progress(tally: Tally) -> str:
    """Lines done, of those before this run too, their rate in this run, and when it ends if that goes on."""
    share = 100 * tally.num_done // tally.num_lines
    rate, _ = tally.rates()
    left = tally.seconds_left
    eta = "unknown" if left is None else str(timedelta(seconds=round(left)))
    return f"{tally.num_done}/{tally.num_lines} lines ({share} %), {rate:.3g} lines/s, ETA {eta}"


def figures(tally: Tally, state: str = "", whole: bool = False) -> str:
    """What else there is to tell: of the last minute, or of the whole run."""
    _, tokens = tally.rates(whole)
    failed = f"{tally.num_failed} failed" if tally.num_failed and not whole else ""
    cached = f"{100 * tally.cached_share:.0f} % of prompt tokens cached" if tally.num_prompt_tokens else ""
    return ", ".join(filter(None, (failed, f"{tokens:.4g} tokens/s", cached, state)))
