"""A connection between two processes, as ZeroMQ has it over TCP: messages are late, but come in order and once, until
one of the two is gone. Then those that were on their way may be lost, from some one on."""

from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from simulation.world import Process, World

LATENCY = 0.003  # seconds at most, but now and then
POLLIN, POLLOUT, NOBLOCK = 1, 2, 1
LOOK = 2e-5  # seconds that a look takes


class Again(Exception):
    """Nothing can be sent: there is nobody at the other end."""


class Socket:
    """One end."""

    def __init__(self, world: World, process: Process | None):
        self.world, self.process = world, process
        self.peer: Socket
        self._inbox: deque[tuple[float, bytes]] = deque()  # when each comes
        self._last = 0.0
        self._is_cut = False

    @property
    def has_message(self) -> bool:
        return bool(self._inbox) and self._inbox[0][0] <= self.world.now

    def send(self, message: bytes, flags: int = 0) -> None:
        """Sends a message, which takes its time. There is always room for it, while the other end is there."""
        world = self.world
        if self._is_cut:
            assert flags & NOBLOCK, "it waits for somebody who is gone"
            raise Again
        if self.process is not None:
            self.process.point("before a message is sent")
        latency = world.rng.random() * LATENCY * (300 if world.chance(0.01) else 1)
        self._last = max(self._last, world.now + latency)
        self.peer._inbox.append((self._last, message))
        world.alarm(self._last)
        if self.process is not None:
            self.process.point("after a message is sent")

    def poll(self, milliseconds: float, flags: int = POLLIN) -> bool:
        """Waits for a message, or for somebody to send one to; whether there is one."""
        self.world.now += LOOK
        if flags == POLLOUT:
            return self.world.wait(lambda: not self._is_cut, milliseconds / 1e3)
        return self.world.wait(lambda: self.has_message, milliseconds / 1e3)

    def recv(self) -> bytes:
        """The next message, which is there."""
        assert self.has_message
        return self._inbox.popleft()[1]

    def cut(self) -> None:
        """The other end is gone: what is on its way is lost from some message on."""
        self._is_cut = True
        on_its_way = [arrival for arrival, _ in self._inbox if arrival > self.world.now]
        for _ in range(self.world.rng.randint(0, len(on_its_way))):
            self._inbox.pop()


def connect(world: World, process: Process) -> tuple[Socket, Socket]:
    """The ends of a connection: that of the owner, who lives, and that of a process."""
    mine, other = Socket(world, None), Socket(world, process)
    mine.peer, other.peer = other, mine
    process.at_death.append(mine.cut)
    return mine, other


def fake_zmq(world: World) -> Any:
    """In the place of the module where sockets are polled."""

    class Poller:
        def __init__(self) -> None:
            self.sockets: list[Socket] = []

        def register(self, socket: Socket, flags: int) -> None:
            self.sockets.append(socket)

        def poll(self, milliseconds: float) -> None:
            world.wait(lambda: any(socket.has_message for socket in self.sockets), milliseconds / 1e3)

    return SimpleNamespace(
        Poller=Poller, POLLIN=POLLIN, POLLOUT=POLLOUT, NOBLOCK=NOBLOCK, Again=Again, Socket=Socket,
        Context=lambda: SimpleNamespace(destroy=_nothing),
    )  # fmt: skip


def _nothing(linger: int = 0) -> None:
    """Sockets have nothing to give back."""


class Threads:
    """In the place of a ThreadPoolExecutor: each call is a task of its own."""

    def __init__(self, world: World):
        self.world = world
        self.futures: list[TaskFuture] = []

    def submit(self, work: Any, *arguments: Any) -> "TaskFuture":
        self.futures.append(TaskFuture(self.world, lambda: work(*arguments)))
        return self.futures[-1]

    def shutdown(self) -> None:
        wait_for(self.world, self.futures)
        self.futures.clear()


class TaskFuture:
    """What comes of a task."""

    def __init__(self, world: World, work: Any):
        self.world = world
        self.task = world.spawn(work)

    def done(self) -> bool:
        return self.task.is_done

    def cancel(self) -> bool:
        return False

    def exception(self) -> BaseException | None:
        wait_for(self.world, [self])
        return self.task.error

    def result(self) -> Any:
        if (error := self.exception()) is not None:
            raise error
        return self.task.result


def wait_for(
    world: World, futures: Iterable[TaskFuture], timeout: float | None = None, return_when: str = "ALL_COMPLETED"
) -> tuple[set[TaskFuture], set[TaskFuture]]:
    """In the place of `concurrent.futures.wait`."""
    futures = list(futures)
    enough = any if return_when == "FIRST_COMPLETED" else all
    world.wait(lambda: enough(future.done() for future in futures), timeout)
    return {one for one in futures if one.done()}, {one for one in futures if not one.done()}
