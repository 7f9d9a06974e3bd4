"""One seed's world: chance, a clock that nobody has to wait for, tasks in the place of processes and threads, and where
they may end.

Everything that happens is drawn from the seed, so that a seed is a run: `World.digest` is that of all that was noted.
"""

import random
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent, greenlet


class Killed(BaseException):
    """The process that runs this is gone: nothing catches it."""


class Hung(AssertionError):
    """Nobody has anything to do, or what goes on does not come to an end."""


class World:
    """Chance, time and tasks of one seed."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0  # seconds
        self.end = 1e9  # when it is taken for hung
        self.counts: Counter[str] = Counter()  # of what has happened, for those who want to know that something did
        self._trace = blake2b()
        self._tasks: list[Task] = []
        self._alarms: list[float] = []  # a heap of times at which something that others wait for may be there
        self._main = getcurrent()
        start = 1.7e9
        self.time = SimpleNamespace(
            monotonic=lambda: self.now, perf_counter=lambda: self.now, time=lambda: start + self.now, sleep=self.sleep
        )  # in the place of the module

    def note(self, *what: Any) -> None:
        """Adds something that has happened to the trace."""
        self._trace.update(repr((round(self.now, 6), *what)).encode())

    def count(self, what: str, times: int = 1) -> None:
        """Counts what has happened."""
        self.counts[what] += times

    @property
    def digest(self) -> str:
        """Of all that was noted so far."""
        return self._trace.hexdigest()[:32]

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens now."""
        return probability > 0 and self.rng.random() < probability

    # --- tasks ---

    def spawn(self, work: Callable[[], Any]) -> "Task":
        """A task that begins as soon as somebody waits."""
        task = Task(self, work)
        self._tasks.append(task)
        return task

    def alarm(self, at: float) -> None:
        """Has those who wait look again at a time."""
        heappush(self._alarms, at)

    def sleep(self, seconds: float) -> None:
        """Lets time pass."""
        self.wait(lambda: False, seconds)

    def wait(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        """Lets others go on until something is so, or for so many seconds; whether it is."""
        deadline = None if seconds is None else self.now + max(0.0, seconds)
        current = getcurrent()
        if current is self._main:
            return self._run_others(ready, deadline)
        task = next(task for task in self._tasks if task.greenlet is current)
        task.ready, task.deadline = ready, deadline
        self._main.switch()
        if task.process is not None:
            task.process.point("wait")
        return ready()

    def _run_others(self, ready: Callable[[], bool], deadline: float | None) -> bool:
        while True:
            runnable = [task for task in self._tasks if task.may_run(self.now)]
            if ready():
                return True
            if deadline is not None and self.now >= deadline:
                return False
            if runnable:
                task = runnable[0] if len(runnable) == 1 else self.rng.choice(runnable)
                task.greenlet.switch()
                if task.greenlet.dead:
                    self._tasks.remove(task)
                continue
            deadlines = [task.deadline for task in self._tasks if task.deadline is not None]
            if deadline is not None:
                deadlines.append(deadline)
            while self._alarms and self._alarms[0] <= self.now:
                heappop(self._alarms)
            deadlines += self._alarms[:1]
            if not deadlines:
                raise Hung("all tasks wait for each other")
            self.now = max(self.now, min(deadlines))
            if self.now > self.end:
                raise Hung("what somebody waits for does not come")


class Task:
    """Something that goes on beside the driver, until it waits."""

    def __init__(self, world: World, work: Callable[[], Any]):
        self.process: Process | None = None
        self.ready: Callable[[], bool] = lambda: True
        self.deadline: float | None = None
        self.error: BaseException | None = None
        self.result: Any = None
        self.greenlet = greenlet(lambda: self._run(work))

    @property
    def is_done(self) -> bool:
        return self.greenlet.dead

    def may_run(self, now: float) -> bool:
        """Whether what it waits for has come, or will not come any more."""
        if self.process is not None and self.process.is_dead:
            return True
        return (self.deadline is not None and now >= self.deadline) or self.ready()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except BaseException as error:
            self.error = error


class Process:
    """What can be killed, at any of the points that it passes. What it still does then (`finally` and the like) comes
    to nothing."""

    def __init__(self, world: World):
        self.world = world
        self.is_dead = False
        self.fuse: int | None = None  # points that it still passes
        self.num_points = 0
        self.at_death: list[Callable[[], None]] = []

    def point(self, name: str) -> None:
        """A point at which it may end."""
        if self.is_dead:
            raise Killed
        self.num_points += 1
        if self.fuse is None:
            return
        self.fuse -= 1
        if self.fuse <= 0:
            self.kill(name)
            raise Killed

    def kill(self, where: str) -> None:
        """Ends it; its tasks find out when they go on."""
        if self.is_dead:
            return
        self.is_dead = True
        self.world.note("killed", where)
        self.world.count(f"killed at: {where}")
        for call in self.at_death:
            call()
