"""A device that runs what is enqueued on it as late, and in as odd an order, as the declared waits allow."""

import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.storage.moving.page_copies import PageCopies
from distkv.storage.moving.streams import Event, Lane
from distkv.storage.paging import NUM_BUFFERS

Wait = tuple[Lane | None, Lane]
"""Who waits, None for a thread of the host, and for what lane's event."""


@dataclass(eq=False)
class SimulatedEvent:
    device: "SimulatedDevice"
    lane: Lane
    happened: bool = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.device.finish(self)


@dataclass(eq=False)
class _Work:
    run: Callable[[], object]
    behind: SimulatedEvent | None = None  # what the lane waits for at this place


@dataclass(eq=False)
class SimulatedDevice:
    """`Streams` of which nothing runs before somebody waits, or `go_on` is called; then lanes run in an order of
    preference that changes now and then, so that one may be far ahead of another. And the threads of the host that
    work beside it, `SimulatedThreads`.

    Args:
        forgets: a wait that is left out, to see that it is missed.
    """

    rng: random.Random
    forgets: Wait | None = None
    errors: list[Exception] = field(default_factory=list)  # of work; a device does not raise
    num_host_waits: int = 0  # of the thread that enqueues
    _queues: dict[Lane, deque[_Work]] = field(default_factory=lambda: {lane: deque() for lane in Lane})
    _preferred: list[Lane] = field(default_factory=lambda: list(Lane))
    _threads: "list[SimulatedThreads]" = field(default_factory=list)
    _in_thread: bool = False

    # --- Streams ---

    def run(self, lane: Lane, work: Callable[[], object]) -> None:
        self._queues[lane].append(_Work(work))

    def record(self, lane: Lane, timed: bool = False) -> SimulatedEvent:
        event = SimulatedEvent(self, lane)
        self.run(lane, partial(setattr, event, "happened", True))
        return event

    def nanoseconds_between(self, first: Event, last: Event) -> int:
        assert first.query() and last.query()
        return 1000

    def wait(self, lane: Lane, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        if (lane, event.lane) != self.forgets:
            self._queues[lane].append(_Work(bool, event))

    def upload(self, lane: Lane, values: Tensor) -> Tensor:
        uploaded = torch.full_like(values, 1 << 40)
        self.run(lane, partial(uploaded.copy_, values.clone()))
        return uploaded

    def seconds(self, lane: Lane, enqueue: Callable[[], object]) -> float:
        start = time.perf_counter()
        enqueue()
        self.finish(self.record(lane))
        return time.perf_counter() - start

    def synchronize(self) -> None:
        while any(self._queues.values()):
            self._run_one()

    # --- how ---

    def threads(self, count: int) -> Any:
        """In place of a ThreadPoolExecutor."""
        self._threads.append(SimulatedThreads(self, count))
        return self._threads[-1]

    def finish(self, event: SimulatedEvent) -> None:
        if self._in_thread and self.forgets == (None, event.lane):
            return
        self.num_host_waits += not self._in_thread and not event.happened
        while not event.happened:
            self._run_one()

    def go_on(self, chance: float) -> None:
        """Lets some of what is enqueued, on the device and in threads, happen."""
        while self.rng.random() < chance:
            busy = [threads for threads in self._threads if threads.tasks]
            if busy and self.rng.random() < 0.2:
                self.rng.choice(busy).run_one()
            elif any(self._queues.values()):
                self._run_one()
            elif not busy:
                return

    def _run_one(self) -> None:
        if self.rng.random() < 0.05:
            self.rng.shuffle(self._preferred)
        for lane in self._preferred:
            queue = self._queues[lane]
            if queue and (queue[0].behind is None or queue[0].behind.happened):
                try:
                    queue.popleft().run()
                except Exception as error:
                    self.errors.append(error)
                return
        raise AssertionError("the lanes wait for each other")


class SimulatedMemory(CpuDevice):
    """A `Device` whose memory is the host's and whose lanes are simulated."""

    runs_behind = True
    num_buffers = NUM_BUFFERS

    def __init__(self, lanes: SimulatedDevice):
        self.lanes = lanes

    def make_copies(self) -> PageCopies:  # type: ignore[override]
        return PageCopies(self.lanes)


class _Task(Future):  # type: ignore[type-arg]
    threads: "SimulatedThreads"

    def result(self, timeout: float | None = None) -> Any:
        self.threads.finish(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.threads.finish(self)
        return super().exception(timeout)


class SimulatedThreads:
    """An executor whose tasks run when somebody waits for one or the device goes on: any of the first `count`."""

    def __init__(self, device: SimulatedDevice, count: int):
        self.device, self.count = device, count
        self.tasks: deque[tuple[_Task, Callable[[], Any]]] = deque()

    def submit(self, work: Callable[..., Any], *args: object) -> _Task:
        task = _Task()
        task.threads = self
        self.tasks.append((task, partial(work, *args)))
        return task

    def finish(self, task: _Task) -> None:
        while not task.done():
            self.run_one()

    def run_one(self) -> None:
        index = self.device.rng.randrange(min(self.count, len(self.tasks)))
        task, work = self.tasks[index]
        del self.tasks[index]
        if not task.set_running_or_notify_cancel():
            return
        self.device._in_thread = True
        try:
            task.set_result(work())
        except Exception as error:
            task.set_exception(error)
        finally:
            self.device._in_thread = False

    def shutdown(self, cancel_futures: bool = False) -> None:
        for task, _ in list(self.tasks) if cancel_futures else []:
            task.cancel()
        while self.tasks:
            self.run_one()
