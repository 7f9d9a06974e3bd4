"""Which replica gets a request: the one that has its beginning, as long as that has room."""

import math
import time
from collections.abc import Iterable
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from distkv.engine.prefix_router import PrefixRouter, prefix_keys
from distkv.ray_serve import pieces  # as a whole: Serve pickles what this module has, not where it got it from

LOST_SECONDS = 30.0  # in which Serve replaces a replica that has ended


class PrefixRequestRouter(RequestRouter):
    """Serve's end of a `PrefixRouter`, one in each ingress. It counts the requests that it has sent itself, and for
    those of others takes what Serve knows of how many a replica has."""

    def initialize_state(self, *, page_size: int, max_num_seqs: int) -> None:  # type: ignore[override]
        """Serve's second constructor.

        Args:
            page_size: of the engines, in tokens.
            max_num_seqs: answers that an engine runs at a time.
        """
        self._policy = PrefixRouter()
        self._page_size, self._num_slots = page_size, max_num_seqs
        self._sent: dict[str, str] = {}  # from requests in flight to the replicas that have them, by name
        # monotonic time when a request was lost at a replica, whose engine has ended or whose connection has failed
        self._lost: dict[str, float] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in order of preference; nobody who has lost its engine."""
        assert pending_request is not None
        pending_request.routing_context.should_backoff = True  # before it asks again
        replicas = {one.replica_id.unique_id: one for one in candidate_replicas}
        if (wanted := pending_request.kwargs.get("replica")) in replicas:
            return [[replicas[wanted]]]
        now = time.monotonic()
        for name, since in pending_request.kwargs.get("avoid", {}).items():
            self._lost[name] = max(self._lost.get(name, -math.inf), since)
        loads = {
            name: self._load(one)
            for name, one in replicas.items()
            if now - self._lost.get(name, -math.inf) >= LOST_SECONDS
        }
        if not loads:
            return []
        if pending_request.metadata.call_method == "stream":
            self._send(pending_request, self._choose(pending_request.args[0], loads))
            first = self._sent[pending_request.metadata.internal_request_id]
            loads[first] = -1.0
        return [[replicas[name]] for name in sorted(loads, key=lambda name: loads[name])]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve has sent it there."""
        if pending_request.metadata.internal_request_id in self._sent:
            self._sent[pending_request.metadata.internal_request_id] = replica_id.unique_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It is over, well or not."""
        self._sent.pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Nothing more is sent there."""
        super().on_replica_actor_died(replica_id)
        self._policy.forget(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve has started or ended some."""
        gone = {one.unique_id for one in self.curr_replicas} - {one.replica_id.unique_id for one in replicas}
        for name in gone:
            self._policy.forget(name)
            self._lost.pop(name, None)
        super().update_replicas(replicas)

    def _choose(self, request: bytes, loads: dict[str, float]) -> str:
        prompt = pieces.decode_prompt(request)
        return self._policy.choose(prefix_keys(prompt.prompt_token_ids, self._page_size, prompt.cache_salt), loads)

    def _send(self, pending_request: PendingRequest, name: str) -> None:
        """Counts a request as that replica's, unless its caller gives it up before Serve has sent it."""
        request_id = pending_request.metadata.internal_request_id
        self._sent[request_id] = name
        pending_request.future.add_done_callback(
            lambda future: self._sent.pop(request_id, None) if future.cancelled() else None
        )

    def _load(self, replica: RunningReplica) -> float:
        """The share of its slots that requests have taken."""
        name, known = replica.replica_id.unique_id, self.replica_queue_len_cache.get(replica.replica_id)
        return max(_count(self._sent.values(), name), known or 0) / self._num_slots


def _count(names: Iterable[str], wanted: str) -> int:
    return sum(name == wanted for name in names)
