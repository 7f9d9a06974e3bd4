"""Whoever comes to the ports of a group without its keys: nobody hears of it, and the group talks on."""

import os
import socket as sockets
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
import zmq

from distkv.workers.group.private_socket import Address, bind_private, connect_private

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"  # of ZMTP 3.1
PATIENCE = 5000  # milliseconds
MOMENT = 100


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def host_of(address: Address) -> tuple[str, int]:
    host, port = address.endpoint.removeprefix("tcp://").split(":")
    return host, int(port)


def talk(bound: zmq.Socket, connected: zmq.Socket) -> None:
    for number, (sender, receiver) in enumerate([(bound, connected), (connected, bound)] * 3):
        sender.send(b"%d" % number)
        assert receiver.poll(PATIENCE), "a message is lost"
        assert receiver.recv() == b"%d" % number


def test_ends_that_know_each_other_talk(context: zmq.Context) -> None:
    bound, address = bind_private(context, "127.0.0.1")
    talk(bound, connect_private(context, address))


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize(
    "said",
    [b"", os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n", GREETING + b"NULL" + bytes(48), GREETING + b"CURVE" + bytes(47)],
    ids=["nothing", "garbage", "http", "null", "curve"],
)
def test_strangers_are_dropped(context: zmq.Context, said: bytes, comes_first: bool) -> None:
    bound, address = bind_private(context, "127.0.0.1")
    connected = None
    if not comes_first:
        connected = connect_private(context, address)
        talk(bound, connected)
    strangers = [sockets.create_connection(host_of(address)) for _ in range(3)]
    for stranger in strangers:
        with suppress(OSError):
            stranger.sendall(said)
            stranger.sendall(b"\x04\x26\x05READY" + os.urandom(30) + b"\x02" + b"\xff" * 8)
    assert not bound.poll(MOMENT)
    talk(bound, connected or connect_private(context, address))
    for stranger in strangers:
        stranger.close()
    assert not bound.poll(MOMENT)


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("key", ["none", "another"])
def test_a_peer_without_the_key_is_not_heard(context: zmq.Context, key: str, comes_first: bool) -> None:
    bound, address = bind_private(context, "127.0.0.1")
    connected = None
    if not comes_first:
        connected = connect_private(context, address)
        talk(bound, connected)
    if key == "none":
        stranger = context.socket(zmq.PAIR)
        stranger.connect(address.endpoint)
    else:
        stranger = connect_private(context, address._replace(key=zmq.curve_keypair()[0]))
    stranger.linger = 0
    with closing(stranger):
        with suppress(zmq.Again):
            stranger.send(b"forged", zmq.NOBLOCK)
        assert not bound.poll(MOMENT)
        talk(bound, connected or connect_private(context, address))
        assert not stranger.poll(MOMENT)
