"""The process that owns a group of ranks, as the leader speaks to it."""

from collections.abc import Iterator
from contextlib import suppress

import msgspec
import zmq

from distkv.engine.protocol import Abort, Add, GetStats, ResetPrefixCache, Shutdown, decode_command, encode
from distkv.workers.group.private_socket import decoded


class Owner:
    """The other end of a PAIR socket."""

    def __init__(self, socket: zmq.Socket):
        self._socket = socket
        self._is_met = False

    def commands(self, wait: int) -> Iterator[Add | Abort | GetStats | ResetPrefixCache | Shutdown]:
        """What has come; where nothing has, the first that comes within so many milliseconds."""
        while self._socket.poll(wait):
            self._is_met, wait = True, 0
            yield decoded(decode_command, self._socket.recv())

    def tell(self, reply: msgspec.Struct) -> None:
        """Sends a message, or drops it when the owner `is_gone`. Before the first command it waits for the owner."""
        with suppress(zmq.Again):
            self._socket.send(encode(reply), zmq.NOBLOCK if self._is_met else 0)

    @property
    def is_gone(self) -> bool:
        """Whether its end of the connection, which is made once, is no more. Ray ends the ranks of an owner that has
        died, but not on nodes that it has lost sight of."""
        return self._is_met and not self._socket.poll(0, zmq.POLLOUT)  # only a peer can be written to, and always
