"""PAIR sockets that reach nobody but who was told their address, by CurveZMQ (http://curvezmq.org).

The key of an address is 32 random bytes that Ray hands over and that never cross the network in the clear: who does not
know them cannot connect, and what is sent is encrypted. Whatever else comes to the port is dropped by the library, and
counted by `stray_connections.py`.
"""

from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple, TypeVar

import msgspec
import zmq

from distkv.workers.errors import DistKVError
from distkv.workers.group.stray_connections import monitor

T = TypeVar("T")
MOST_BYTES = 2**30  # of a message; a longer one ends its connection before memory is taken for it
HANDSHAKE_SECONDS = 30.0  # in which the other end must show that it has the key; its process may be busy meanwhile


class Address(NamedTuple):
    """Where one socket is reached, by one peer."""

    endpoint: str
    key: bytes  # the public one of who has bound it


def bind_private(context: zmq.Context, host: str) -> tuple[zmq.Socket, Address]:
    """A socket at a free port, and what its peer must know."""
    socket = _make(context)
    key, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_server = True
    port = socket.bind_to_random_port(f"tcp://{host}")
    return socket, Address(f"tcp://{host}:{port}", key)


def connect_private(context: zmq.Context, address: Address, seconds: float = HANDSHAKE_SECONDS) -> zmq.Socket:
    """The other end, once it has met the one that was bound. They meet once: over a connection that is made again
    messages would be missed without a word. Raises DistKVError when nobody who has its key answers there within so many
    seconds."""
    socket = _make(context)
    socket.reconnect_ivl = -1
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = address.key
    with closing(monitor(socket, zmq.EVENT_HANDSHAKE_SUCCEEDED)) as met:
        socket.connect(address.endpoint)
        is_met = met.poll(round(seconds * 1e3))
        socket.monitor(None, 0)
    if not is_met:
        socket.close(linger=0)
        raise DistKVError(
            f"nobody who has its key answered at {address.endpoint} within {seconds:g} s: see that nodes of the "
            "cluster reach each other at any port, and that no process of the engine is stopped"
        )
    return socket


def decoded(decode: Callable[[bytes], T], message: bytes) -> T:
    """A message of a peer's. Raises DistKVError when it is none: the peer is of another version, or broken."""
    try:
        return decode(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DistKVError(f"a message of {len(message)} bytes within the group cannot be read ({error})") from error


def _make(context: zmq.Context) -> zmq.Socket:
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.maxmsgsize = MOST_BYTES
    return socket
