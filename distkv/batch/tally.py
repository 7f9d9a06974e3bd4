"""How far a batch is, and how fast."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distkv.batch.records import Record, read_usage

WINDOW = 60.0  # seconds that rates are taken over


@dataclass(frozen=True)
class _Mark:
    """What was done at a moment of the monotonic clock."""

    seconds: float
    num_lines: int
    num_tokens: int


class Tally:
    """Counts lines and tokens. Rates are those of this run alone."""

    def __init__(self, num_lines: int, num_answered: int, num_failed: int, clock: Callable[[], float] = time.monotonic):
        """Of a file of so many lines, of which so many were done before."""
        self.num_lines = num_lines
        self.num_answered, self.num_failed = num_answered, num_failed
        self.num_prompt_tokens = self.num_cached_tokens = self.num_tokens = 0  # of this run
        self._clock = clock
        self._first = _Mark(clock(), self.num_done, 0)
        self._marks = deque([self._first])

    @property
    def num_done(self) -> int:
        """Lines that are in one of the files."""
        return self.num_answered + self.num_failed

    @property
    def num_run(self) -> int:
        """Those of them that are of this run."""
        return self.num_done - self._first.num_lines

    @property
    def seconds(self) -> float:
        """Since the first line could be asked for."""
        return self._clock() - self._first.seconds

    def begin(self) -> None:
        """The time of the run counts from now on."""
        self._first = _Mark(self._clock(), self.num_done, 0)
        self._marks = deque([self._first])

    def add(self, record: Record) -> None:
        """Counts a line that has been written."""
        if not record.is_answer or record.response is None:
            self.num_failed += 1
            return
        self.num_answered += 1
        usage = read_usage(record.response.body)
        self.num_prompt_tokens += usage.num_prompt_tokens
        self.num_cached_tokens += usage.num_cached_tokens
        self.num_tokens += usage.num_answer_tokens

    def mark(self) -> None:
        """To be called every second or so: what rates are taken from."""
        now = self._clock()
        self._marks.append(_Mark(now, self.num_done, self.num_tokens))
        while len(self._marks) > 2 and now - self._marks[1].seconds >= WINDOW:
            self._marks.popleft()

    def rates(self, whole: bool = False) -> tuple[float, float]:
        """Lines and tokens of answers per second: of the last minute, or of the whole run."""
        begun = self._first if whole else self._marks[0]
        seconds = max(self._clock() - begun.seconds, 1e-9)
        return (self.num_done - begun.num_lines) / seconds, (self.num_tokens - begun.num_tokens) / seconds

    @property
    def seconds_left(self) -> float | None:
        """Until all lines are done, at the rate of the last minute; None while nothing is known."""
        rate, _ = self.rates()
        return (self.num_lines - self.num_done) / rate if rate else None

    @property
    def cached_share(self) -> float:
        """Of the tokens of prompts, what was found in the cache."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0
