"""What the cluster says of nodes that it drains, and what it does not say."""

from types import SimpleNamespace
from typing import Any

import pytest

from distkv.workers.group import drain_watch
from distkv.workers.group.drain_watch import DrainWatch


def test_a_drained_node_is_told_of_though_nobody_says_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    drained = {"a": 0}
    free: dict[str, dict[str, float]] | None = None

    def available() -> dict[str, dict[str, float]]:
        if free is None:
            raise RuntimeError("no answer")
        return free

    client = SimpleNamespace(get_draining_nodes=lambda timeout: drained)
    private = SimpleNamespace(
        worker=SimpleNamespace(global_worker=SimpleNamespace(gcs_client=client)),
        state=SimpleNamespace(available_resources_per_node=available),
    )
    nodes = [{"NodeID": name, "Alive": True} for name in "abc"]
    ray: Any = SimpleNamespace(_private=private, nodes=lambda: nodes)
    monkeypatch.setattr(drain_watch, "ray", ray)
    monkeypatch.setattr(drain_watch, "LOOK_SECONDS", 3600.0)  # its thread does not look
    watch = DrainWatch(["a", "b"], "CPU")
    try:
        for room, has_room in ((None, False), ({"c": {"CPU": 1.0}}, True), (None, True), ({}, False)):
            free = room
            if room is None:
                with pytest.raises(RuntimeError, match="no answer"):
                    watch._look()
            else:
                watch._look()
            assert watch.notice is not None and (watch.notice.node_id, watch.notice.has_room) == ("a", has_room)
        drained.clear()
        watch._look()
        assert watch.notice is None
    finally:
        watch.close()
