"""Where the ranks of a group find each other."""

import socket

import pytest

from distkv.workers.group.process_group import open_store


def test_a_store_keeps_the_port_that_it_has_told() -> None:
    """Else another process may take it before the ranks come. No other address of the machine leads to it."""
    store = open_store("127.0.0.1")
    with pytest.raises(ConnectionRefusedError), socket.socket() as elsewhere:
        elsewhere.connect(("127.0.0.2", store.port))
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("0.0.0.0", store.port))
    joined = open_store("127.0.0.1", store.port)
    store.set("key", "value")
    assert joined.get("key") == b"value"
