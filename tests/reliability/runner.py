"""Makes tries, one after the other."""

import random
import sys

from reliability.bench import Bench, Setting
from reliability.counts import Try
from reliability.driver_process import Gone, Hung
from reliability.faults import Fault
from reliability.trial import Trial

LIMIT, LEAVE = 120.0, 60.0  # seconds, see `Bench`
LOG_LINES = 60


class Runner:
    """Makes tries one after the other, and keeps a bench from one to the next."""

    def __init__(self, limit: float = LIMIT, leave: float = LEAVE):
        """
        Args:
            limit, leave: see `Bench`.
        """
        self._limits = limit, leave
        self._bench: Bench | None = None
        self._record = Try("", "")

    def run(self, fault: Fault, seed: str) -> Try:
        """Tries a fault once."""
        self._record = record = Try(fault.name, seed)
        trial = Trial(record, random.Random(f"{fault.name} {seed}"), self._bench_of)
        try:
            fault.run(trial)
        except Hung as hung:
            record.hung.append(str(hung))
            self._remove()
        except Gone as gone:
            record.unexplained.append(str(gone))
            self._remove()
        except BaseException:
            self._remove()
            raise
        if not record.is_clean:  # the next try is to begin anew
            self._show_log()
            self.close()
        return record

    def close(self) -> None:
        """Ends the bench; what is left of it counts for the last try."""
        bench, self._bench = self._bench, None
        if bench is None:
            return
        try:
            self._record.leaked += bench.close()
        except Hung as hung:
            self._record.hung.append(str(hung))
        except Gone as gone:
            self._record.unexplained.append(str(gone))

    def _bench_of(self, setting: Setting) -> Bench:
        if self._bench is None or self._bench.setting != setting:
            self.close()
            self._bench = Bench(setting, *self._limits)
        return self._bench

    def _remove(self) -> None:
        self._show_log()
        bench, self._bench = self._bench, None
        if bench is not None:
            bench.remove()

    def _show_log(self) -> None:
        """What drivers have said, in which the reason may be."""
        log = self._bench and self._bench.folder / "home" / "driver.log"
        if log and log.exists():
            print("".join(log.read_text().splitlines(keepends=True)[-LOG_LINES:]), file=sys.stderr)
