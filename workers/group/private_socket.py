"""PAIR sockets that reach nobody but who was told their address, by CurveZMQ (http://curvezmq.org).

The key of an address is 32 random bytes that Ray hands over and that never cross the network in the clear: who does not
know them cannot connect, and what is sent is encrypted. Whatever else comes to the port is dropped by the library.
"""

from typing import NamedTuple

import zmq

MOST_BYTES = 2**30  # of a message; a longer one ends its connection before memory is taken for it


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


def connect_private(context: zmq.Context, address: Address) -> zmq.Socket:
    """The other end."""
    socket = _make(context)
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = address.key
    socket.connect(address.endpoint)
    return socket


def _make(context: zmq.Context) -> zmq.Socket:
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.maxmsgsize = MOST_BYTES
    return socket
