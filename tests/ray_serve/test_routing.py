"""Where the router sends requests, without Serve around it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from distkv.ray_serve import routing
from distkv.ray_serve.routing import LOST_SECONDS, PrefixRequestRouter


class Router:
    """A `PrefixRequestRouter` with two replicas, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(routing.time, "monotonic", lambda: self.now)
        self.router: Any = PrefixRequestRouter.__new__(PrefixRequestRouter)
        self.router.initialize_state(page_size=16, max_num_seqs=4)
        self.router._replica_queue_len_cache = SimpleNamespace(get=lambda name: 0)
        self.replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "AB"]

    def names(self, **kwargs: Any) -> list[str]:
        """The replicas that a call may go to."""
        pending: Any = SimpleNamespace(
            kwargs=kwargs, routing_context=SimpleNamespace(), metadata=SimpleNamespace(call_method="info")
        )
        ranks = asyncio.run(self.router.choose_replicas(self.replicas, pending))
        return sorted(one.replica_id.unique_id for rank in ranks for one in rank)


def test_a_replica_is_left_alone_for_a_while_whenever_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine has ended, and Serve replaces it; or a connection to it has failed, and it lives on."""
    router = Router(monkeypatch)
    lost = {"A": router.now}
    assert router.names(avoid=lost) == ["B"] and router.names() == ["B"]
    router.now += LOST_SECONDS - 1
    assert router.names(avoid=lost) == ["B"]
    router.now += 1
    assert router.names(avoid=lost) == ["A", "B"]  # asking again renews nothing
    assert router.names(avoid={"A": router.now}) == ["B"]
    assert router.names(avoid=lost) == ["B"]
    assert router.names(replica="A") == ["A"]  # that is to be told something
