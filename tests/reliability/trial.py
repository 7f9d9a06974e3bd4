"""One try of a fault: its random numbers, its moment, and what it counts."""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from reliability.bench import Bench, Setting
from reliability.counts import Try
from reliability.driver_process import DriverProcess
from reliability.load import Load

LOAD = 6  # requests at a time
NONE = r"(?!)"  # a pattern of no error at all


@dataclass
class Trial:
    """What a fault is given."""

    record: Try
    random: random.Random
    bench_of: Callable[[Setting], Bench]
    """The bench of a setting, which is that of the try before if that had the same; else that is closed first."""

    def load(self, bench: Bench, driver: DriverProcess | None = None) -> Load:
        """Begins some of the bench's requests on its driver, or another one. Their prompts are known to the engine from
        earlier tries, or they are not."""
        salt = self.random.choice([None, f"{self.record.seed} {self.random.random()}"])
        chosen = self.random.sample(bench.requests, LOAD)
        return (driver or bench.driver).ask(chosen, salt)

    def await_moment(self, driver: DriverProcess, load: Load) -> float:
        """Waits until so many tokens of a load have come as chance has it, none perhaps, and a little longer; returns
        the monotonic time."""
        count = self.random.randrange(load.num_expected * 9 // 10)
        driver.listen(lambda: load.is_done or load.num_tokens >= count)
        time.sleep(self.random.random() * 0.02)
        self.record.moment = f"after {count} of {load.num_expected} tokens"
        return time.monotonic()

    def compare(self, bench: Bench, load: Load, explained: str = NONE) -> None:
        """Compares what has come with the answers of an undisturbed run.

        Args:
            explained: a pattern of errors that requests may have ended with. What they had before is compared too.
        """
        for request in load.requests:
            name = load.name_of(request)
            error = load.ended.get(name, "it has not ended")
            if error is not None:
                is_explained = re.search(explained, error) is not None
                (self.record.errors if is_explained else self.record.unexplained).append(f"request {name}: {error}")
            for index, tokens in load.answers[name].items():
                known = bench.known[request.key][index]
                where = f"request {name}, answer {index}"
                self.record.answers += 1
                self.record.tokens += len(tokens)
                self.record.wrong += [
                    f"{where}: token {place} is {token}, not {known[place] if place < len(known) else 'there'}"
                    for place, token in enumerate(tokens)
                    if place >= len(known) or token != known[place]
                ]
                if error is None and len(tokens) < len(known):
                    self.record.unexplained.append(f"{where} ended after {len(tokens)} of {len(known)} tokens")

    def finish(self, bench: Bench, load: Load, since: float | None = None, explained: str = NONE) -> None:
        """Waits for the answers, compares them, and looks what an idle engine holds.

        Args:
            since: the monotonic time of a fault under this load, of which the pause is taken.
            explained: see `compare`.
        """
        self.finish_on(bench, bench.driver, load, since, explained)

    def finish_and_go_on(
        self, bench: Bench, driver: DriverProcess, load: Load, since: float, explained: str = NONE
    ) -> None:
        """As `finish_on`; then, with the fault over, some more requests, which nothing may end."""
        self.finish_on(bench, driver, load, since, explained)
        again = self.load(bench, driver)
        self.finish_on(bench, driver, again)

    def finish_on(
        self, bench: Bench, driver: DriverProcess, load: Load, since: float | None = None, explained: str = NONE
    ) -> None:
        """The same for a driver that is not the bench's."""
        driver.finish(load)
        if since is not None and load.times[-1] > since:
            self.record.pauses.append(load.pause_after(since))
        elif since is not None:
            self.record.moment += ", when all tokens had come"
        self.compare(bench, load, explained)
        self.record.leaked += bench.what_is_held(driver)
        stats = driver.stats()
        recomputed, wrong = stats.get("recomputed", 0), stats.get("checksum_failures", 0)
        if recomputed or wrong:
            self.record.moment += f"; {recomputed} pages computed again, {wrong} checksums wrong"
