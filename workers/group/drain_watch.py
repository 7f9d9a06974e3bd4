"""Nodes that a Ray cluster is about to lose, and says so before: a cloud that takes a machine back, say."""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import ray

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks
ANSWER_SECONDS = 3.0  # in which the cluster's head is to answer


@dataclass(frozen=True)
class Notice:
    """A node of a group is being drained: Ray starts nothing there any more, and then it is gone."""

    node_id: str
    seen: float  # monotonic time when it was seen first
    end: float  # monotonic time when the node goes; math.inf if none is said
    has_room: bool  # whether other nodes are known to have room for the whole group, if that ends

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()


class DrainWatch:
    """Looks every second, in a thread of its own, since the cluster's head may be gone."""

    def __init__(self, node_ids: Iterable[str], kind: str):
        """
        Args:
            node_ids: of each rank.
            kind: the resource that a rank takes one of.
        """
        self.notice: Notice | None = None  # of the node that goes first
        self._ranks, self._kind = Counter(node_ids), kind
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distkv-drain-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Looks no more. A second call does nothing."""
        self._is_over.set()
        self._thread.join(ANSWER_SECONDS)

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_SECONDS):
            try:
                self._look()
            except Exception as error:  # an engine that runs is not ended by that
                log.debug("the cluster does not say which nodes are drained: %s", error)

    def _look(self) -> None:
        client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
        drained: dict[str, int] = client.get_draining_nodes(timeout=ANSWER_SECONDS)  # ends in ms, 0 for none
        own = self._ranks.keys() & drained.keys()
        if not own:
            self.notice = None  # it was called off, or the node is gone
            return
        now, wall = time.monotonic(), time.time()
        ends = {node: now + drained[node] / 1e3 - wall if drained[node] else math.inf for node in own}
        first = min(own, key=lambda node: (ends[node], node))
        before = self.notice
        seen, end, has_room = now, ends[first], False
        if before is not None and before.node_id == first:
            seen, end, has_room = before.seen, min(before.end, end), before.has_room
        self.notice = Notice(first, seen, end, has_room)  # though nobody may answer what is asked next
        self.notice = replace(self.notice, has_room=self._has_room(drained))

    def _has_room(self, drained: Iterable[str]) -> bool:
        """Whether the nodes that stay have room for all ranks, counting what those there give back."""
        free = ray._private.state.available_resources_per_node()
        staying = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in set(drained)]
        room = sum(int(free.get(node, {}).get(self._kind, 0)) + self._ranks[node] for node in staying)
        return room >= self._ranks.total()
