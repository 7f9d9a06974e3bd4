"""A rank in a Ray actor of its own."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import zmq
from torch.distributed import TCPStore

from distkv.storage.process_limits import usable_cores
from distkv.workers.cache_place import CachePlace, free_bytes
from distkv.workers.group.channel import FollowerChannel, LeaderChannel
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.log_lines import LogCollector, LogLine
from distkv.workers.group.private_socket import Address, bind_private
from distkv.workers.group.process_group import open_store
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.stage_pulse import StagePulse
from distkv.workers.group.stray_connections import StrayConnections
from distkv.workers.kinds import KINDS
from distkv.workers.rank import Loaded, Rank
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes

LeaderMain = Callable[..., None]
"""What rank 0 runs: `main(executor, request_socket, take_log, *arguments)`, where `take_log` returns what the ranks
have logged since the last call. Followers end when it returns."""


@dataclass(frozen=True)
class Addresses:
    """Where rank 0 of a group is reached."""

    store: tuple[str, int]  # by the other ranks
    requests: Address  # by the owner of the group
    plans: list[Address]  # by each follower


def process_states(pids: list[int]) -> list[str]:
    """The states of processes of this node, each a letter as in `proc(5)`; "Z" of one that is gone."""
    states = []
    for pid in pids:
        try:
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        except OSError:
            states.append("Z")
    return states


class RankActor:
    """A rank in a process of its own."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._context.linger = 0
        self._log = LogCollector()
        self._store: TCPStore | None = None
        self._loaded: Rank | None = None

    @property
    def _rank(self) -> Rank:
        assert self._loaded is not None, "load comes first"
        return self._loaded

    def node(self) -> tuple[str, int, int]:
        """The id of the node this actor runs on, the cores that it may use there, and its process."""
        return ray.get_runtime_context().get_node_id(), usable_cores(), os.getpid()

    def open(self, host: str, num_followers: int) -> Addresses:
        """On rank 0: binds the group's sockets."""
        self._followers = LeaderChannel(self._context, host, num_followers)
        self._requests, requests = bind_private(self._context, host)
        self._strays = StrayConnections([self._requests, *self._followers.sockets])
        self._store = open_store(host)
        return Addresses((host, self._store.port), requests, self._followers.addresses)

    def load(self, config: RankConfig, rank: int, store: tuple[str, int]) -> Loaded:
        """Joins the other ranks and loads this rank's part of the model; returns what it will run."""
        joined = self._store or open_store(*store)
        collectives, in_order = KINDS[config.device].collectives, bool(config.batch_invariant)
        self._loaded = Rank(config, Communicators.join(config.layout, rank, joined, collectives, in_order))
        return self._loaded.loaded

    def take_log(self) -> list[LogLine]:
        """See `LogCollector.take`."""
        return self._log.take()

    def capacity(self, ranks_on_node: int, of_device: bool) -> Capacity:
        """See `Rank.page_capacity`."""
        return self._rank.page_capacity(ranks_on_node, of_device)

    def free_disk_bytes(self, folder: Path) -> int:
        """See `free_bytes`."""
        return free_bytes(folder)

    def allocate(self, sizes: PoolSizes, place: CachePlace | None) -> tuple[int, int, int]:
        """See `Rank.allocate`."""
        return self._rank.allocate(sizes, place)

    def bandwidth(self) -> Bandwidth:
        """See `Rank.bandwidth`."""
        return self._rank.bandwidth()

    def lead(self, main: LeaderMain, arguments: tuple[Any, ...]) -> list[LogLine]:
        """On rank 0: runs `main` until it returns, then ends the followers. Returns what was logged last."""
        try:
            main(RankExecutor.on(self._rank, self._followers), self._requests, self._take_logs, *arguments)
            self._followers.send(None)
            self._followers.receive()  # they have let go of the disk, which rank 0 sweeps
        except BaseException as error:
            try:
                self._rank.close_after_error()
            except Exception as another:  # such as a folder that followers, which do not know yet, still write to
                error.add_note(f"and then the rank could not be closed: {type(another).__name__}: {another}")
            raise
        self._rank.close()
        self._rank.peers.close()
        return self._log.take()

    def _take_logs(self) -> list[LogLine]:
        self._strays.look()
        return self._log.take()

    def follow(self, address: Address) -> list[LogLine]:
        """On other ranks: runs plans until the end is sent. Returns what was logged last."""
        leader = FollowerChannel(self._context, address)
        peers, pulse = self._rank.peers, None
        if not self._rank.shard.is_first_stage:
            assert peers.store is not None
            pulse = StagePulse(peers.store, lambda: peers.progress)
        self._rank.warm_up()
        while (plan := leader.receive()) is not None:
            self._rank.plan_check.check(plan)
            self._rank.execute(plan)
            report = self._rank.take_report()
            report.log = self._log.take()
            leader.send(report)
        if pulse is not None:
            pulse.close()
        self._rank.close()
        leader.send(Report())
        self._rank.peers.close()
        return self._log.take()
