"""When the leader of a group takes its owner for gone."""

from collections.abc import Iterator

import pytest
import zmq

from distkv.engine.protocol import Accepted, GetStats, decode_reply, encode
from distkv.launch.owner import Owner
from distkv.workers.group.private_socket import bind_private, connect_private

PATIENCE = 10_000  # milliseconds


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_an_owner_that_leaves_is_gone_and_what_it_said_before_is_heard(context: zmq.Context) -> None:
    bound, address = bind_private(context, "127.0.0.1")
    owner = Owner(bound)
    assert not owner.is_gone, "it has not come yet"
    process = zmq.Context()
    socket = connect_private(process, address)
    socket.send(encode(GetStats()))
    assert list(owner.commands(PATIENCE)) == [GetStats()]
    owner.tell(Accepted())
    assert socket.poll(PATIENCE) and decode_reply(socket.recv()) == Accepted()
    assert not owner.is_gone
    socket.send(encode(GetStats()))
    process.destroy()
    heard = list(owner.commands(PATIENCE))
    while not owner.is_gone:
        heard += owner.commands(10)
    assert heard == [GetStats()]
    owner.tell(Accepted())  # which nobody gets, and nobody waits for
