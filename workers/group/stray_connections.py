"""Counts who comes to a group's sockets without their key: ZeroMQ drops such connections without a word."""

import logging
import time
from collections.abc import Sequence
from itertools import count

import zmq
from zmq.utils.monitor import recv_monitor_message

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks
REMARK_SECONDS = 60.0  # between two lines of the log
_names = count()


def monitor(socket: zmq.Socket, events: int) -> zmq.Socket:
    """Where a socket tells what becomes of its connections: such of these events as come from now on."""
    endpoint = f"inproc://monitor-{next(_names)}"
    socket.monitor(endpoint, events)
    listener = socket.context.socket(zmq.PAIR)
    listener.rcvhwm = 0  # or the sockets' own thread would wait when nobody has looked for a while
    listener.connect(endpoint)
    return listener


class StrayConnections:
    """Connections to bound sockets that have ended before they showed the key. Used by one thread."""

    def __init__(self, sockets: Sequence[zmq.Socket]):
        """Counts from now on."""
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._listeners = [_Listener(monitor(socket, events)) for socket in sockets]
        self._looked = self._told = -float("inf")  # monotonic times
        self._num_told = 0

    @property
    def num_dropped(self) -> int:
        """Such connections, as of the last look."""
        return sum(one.num_dropped for one in self._listeners)

    def look(self) -> None:
        """Takes in what has happened, and warns of it every now and then. Waits for nothing."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for one in self._listeners:
            one.look()
        if self.num_dropped > self._num_told and now - self._told >= REMARK_SECONDS:
            self._told, self._num_told = now, self.num_dropped
            log.warning(
                "%d connection(s) to the sockets of this engine did not have their key and were dropped: somebody else "
                "reaches its ports", self.num_dropped,
            )  # fmt: skip


class _Listener:
    """What one socket's connections have come to."""

    def __init__(self, events: zmq.Socket):
        self.num_dropped = 0
        self._events = events
        self._unknown: list[int] = []  # descriptors of connections that have not shown the key yet, the youngest last

    def look(self) -> None:
        while self._events.poll(0):
            told = recv_monitor_message(self._events)
            if told["event"] == zmq.EVENT_ACCEPTED:
                self._unknown.append(int(told["value"]))
            elif told["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                del self._unknown[-1:]  # it does not say which; those that stay silent are older
            elif told["value"] in self._unknown:
                self._unknown.remove(int(told["value"]))
                self.num_dropped += 1
