"""Whoever comes to the ports of a group without its keys: nobody hears of it, and the group talks on."""

import os
import socket as sockets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
import zmq

from distkv import DistKVError
from distkv.workers.group import stray_connections
from distkv.workers.group.private_socket import Address, bind_private, connect_private
from distkv.workers.group.stray_connections import StrayConnections

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"  # of ZMTP 3.1
PATIENCE = 60_000  # milliseconds
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
    stranger = context.socket(zmq.PAIR)
    if key == "another":
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        stranger.curve_serverkey = zmq.curve_keypair()[0]
    stranger.connect(address.endpoint)
    stranger.linger = 0
    with closing(stranger):
        with suppress(zmq.Again):
            stranger.send(b"forged", zmq.NOBLOCK)
        assert not bound.poll(MOMENT)
        talk(bound, connected or connect_private(context, address))
        assert not stranger.poll(MOMENT)


@pytest.mark.parametrize("who", ["nobody", "silence", "without a key", "another key"])
def test_the_other_end_is_not_waited_for_without_end(context: zmq.Context, who: str) -> None:
    """Whoever has taken its port meanwhile."""
    taken = sockets.create_server(("127.0.0.1", 0))
    endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    if who != "silence":
        taken.close()
    stranger = context.socket(zmq.PAIR)
    if who == "without a key":
        stranger.bind(endpoint)
    if who == "another key":
        _, (endpoint, _) = bind_private(context, "127.0.0.1")
    with closing(taken), pytest.raises(DistKVError, match=r"nobody who has its key answered at tcp://.* within 0\.2 s"):
        connect_private(context, Address(endpoint, zmq.curve_keypair()[0]), seconds=0.2)
    assert not stranger.poll(0)


def test_strangers_are_counted_and_logged(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that say nothing when they leave; whoever has the key never, though it leaves too."""
    monkeypatch.setattr(stray_connections, "LOOK_SECONDS", 0.0)
    bound, address = bind_private(context, "127.0.0.1")
    strays = StrayConnections([bound])
    silent = sockets.create_connection(host_of(address))
    connected = connect_private(context, address)
    for said in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(64), GREETING + b"NULL" + bytes(48)):
        with sockets.create_connection(host_of(address)) as stranger, suppress(OSError):
            stranger.sendall(said)
            stranger.recv(4096), stranger.recv(4096)
    await_strays(strays, 3)
    talk(bound, connected)
    silent.close()
    await_strays(strays, 4)
    connected.close(linger=0)
    assert len(caplog.records) == 1, "not each of them"
    monkeypatch.setattr(stray_connections, "REMARK_SECONDS", 0.0)
    assert not bound.poll(MOMENT), "time for the end of who has the key"
    strays.look()
    assert [record.args for record in caplog.records[1:]] == [(4,)]


def await_strays(strays: StrayConnections, number: int) -> None:
    deadline = time.monotonic() + PATIENCE / 1e3
    while strays.num_dropped < number and time.monotonic() < deadline:
        strays.look()
    assert strays.num_dropped == number


def test_a_connection_that_is_cut_is_not_made_again(context: zmq.Context) -> None:
    """What is sent meanwhile would be missing, and nobody would know."""
    bound, address = bind_private(context, "127.0.0.1")
    with sockets.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor() as threads:

        def pass_through() -> list[sockets.socket]:
            pair = [door.accept()[0], sockets.create_connection(host_of(address))]
            threads.submit(pump, *pair)
            threads.submit(pump, *reversed(pair))
            return pair

        pair = threads.submit(pass_through)
        connected = connect_private(context, Address(f"tcp://127.0.0.1:{door.getsockname()[1]}", address.key))
        talk(bound, connected)
        for end in pair.result():
            end.shutdown(sockets.SHUT_RDWR)
        door.settimeout(0.5)
        with pytest.raises(TimeoutError):
            door.accept()


def pump(source: sockets.socket, target: sockets.socket) -> None:
    """Passes on what comes until either end is cut."""
    with suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)
