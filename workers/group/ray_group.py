"""A tensor-parallel group of Ray actors: where they are placed, how they start, and how their death is noticed.

Ray starts and ends the ranks and reports deaths. It carries nothing per step: plans go over ZeroMQ, tensors over NCCL
or gloo. The group belongs to the process that made it, and ends with it.
"""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distkv.workers.cache_place import CachePlace
from distkv.workers.errors import ConfigError, DistKVError, WorkerDied
from distkv.workers.group.drain_watch import DrainWatch, Notice
from distkv.workers.group.log_lines import relay
from distkv.workers.group.placement import CHECK_SECONDS, Fewer, place
from distkv.workers.group.private_socket import Address
from distkv.workers.group.process_group import LOOPBACK
from distkv.workers.group.rank_actor import LeaderMain, RankActor, process_states
from distkv.workers.group.ray_cluster import connect, disconnect
from distkv.workers.group.ray_errors import TOKENS_DIFFER, cause_of, failure_of, tokens_differ
from distkv.workers.kinds import KINDS
from distkv.workers.rank import Loaded
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes

log = logging.getLogger(__name__)

STATES_TIMEOUT = 10.0  # seconds in which a node is to tell of its processes
STOPPED = {"T": "is stopped (SIGSTOP)", "t": "is held by a debugger", "Z": "is gone"}  # by the letters of proc(5)
DEATHS_SETTLE = 5.0  # seconds in which the first of several deaths is told from those that follow from it
DEATH_TIMEOUT = 15.0  # seconds; Ray itself kills one after 5 that does not end
# Variables of the caller's environment that reach the ranks.
PASSED_ENVIRONMENT = ("HF_HOME", "TRITON_CACHE_DIR", "TMPDIR")
PASSED_PREFIXES = ("NCCL_", "GLOO_")


@dataclass(frozen=True)
class Node:
    """Where a rank runs."""

    node_id: str
    host: str
    num_cpus: int
    pid: int


def hung_rank(states: list[str], nodes: list[Node]) -> tuple[int, str]:
    """Which of the ranks that nothing comes of is to blame, and why: one whose process does not run, or else one whose
    node does not tell, or else the first.

    Args:
        states: of the ranks' processes, by the letters of proc(5); "" where the node has not told.
    """
    if stopped := stopped_ranks(states, nodes):
        return next(iter(stopped.items()))
    if "" in states:
        return states.index(""), "its node has not told whether its process runs"
    return 0, "no process is stopped, so a collective, a device or a file system is stuck"


def stopped_ranks(states: list[str], nodes: list[Node]) -> dict[int, str]:
    """The ranks whose processes do not run, in their order, and why; `states` as for `hung_rank`."""
    return {
        rank: f"its process {nodes[rank].pid} {STOPPED[state]}" for rank, state in enumerate(states) if state in STOPPED
    }


class RayGroup:
    """A `RankGroup` as the owner of its engine sees it; the engine itself runs beside rank 0, see `start`."""

    def __init__(
        self,
        size: int,
        address: str | None,
        device: str,
        check: Callable[[], None] = lambda: None,
        num_groups: int = 1,
        fewer: Fewer | None = None,
        num_stages: int = 1,
        hang_timeout: float = math.inf,
    ):
        """Takes `size` bundles of the cluster and starts an actor on each.

        Args:
            address: as `ray.init` takes it; None takes a running cluster or starts one on this machine.
            device: "cuda", "cpu", or "auto" for CUDA when the cluster has a GPU.
            check: called every now and then while this waits, here and in what comes before `start`; what it raises
                ends the wait.
            num_groups: of this size that are to share the cluster's cores.
            fewer: when fewer ranks will do; `size` has their number then.
            num_stages: of the pipeline that all ranks are.
            hang_timeout: see `check_stopped`.

        Raises CapacityError when the cluster lacks the resources, ConfigError when it cannot be reached.
        """
        self.size, self._num_groups, self._num_stages = size, num_groups, num_stages
        self._check_wanted, self._hang_timeout = check, hang_timeout
        self._stopped: set[int] = set()  # ranks whose processes did not run at the last look
        self._heard()
        self._connected = False
        self._placement: Any = None
        self._actors: list[Any] = []
        self._mains: list[Any] = []  # the refs of lead() and follow(): whoever of them ends too early has died
        self.nodes: list[Node] = []
        self._drain_watch: DrainWatch | None = None
        self.request_address = Address("", b"")
        try:
            connect(address, size)
            self._connected = True
            total = ray.cluster_resources()
            self.device = ("cuda" if total.get("GPU", 0) >= 1 else "cpu") if device == "auto" else device
            self._place(fewer)
            hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            self.nodes = [Node(node_id, hosts[node_id], *process) for node_id, *process in self._call("node")]
            self._tell_places(hosts)
        except BaseException:
            self.close()
            raise

    def load(self, config: RankConfig) -> list[Loaded]:
        """See `RankGroup.load`."""
        here = ray.get_runtime_context().get_node_id()
        alone = all(node.node_id == here for node in self.nodes)
        host = LOOPBACK if alone else self.nodes[0].host
        addresses = self._wait([self._actors[0].open.remote(host, self.size - 1)])[0]
        self.request_address, self._plan_addresses = addresses.requests, addresses.plans
        refs = []
        for rank, actor in enumerate(self._actors):
            refs.append(actor.load.remote(self._for_node(config, rank), rank, addresses.store))
        loaded = self._wait(refs)
        self._relay_logs()
        return loaded

    def capacity(self, of_device: bool) -> Capacity:
        """See `RankGroup.capacity`."""
        per_node = self._ranks_per_node()
        rooms = self._wait(
            [
                actor.capacity.remote(per_node[node.node_id], of_device)
                for actor, node in zip(self._actors, self.nodes, strict=True)
            ]
        )
        tightest = min(rooms, key=lambda room: room.device)
        return Capacity(tightest.device, min(room.host for room in rooms), tightest.budget)

    def free_disk_bytes(self, folder: Path) -> int:
        """See `RankGroup.free_disk_bytes`."""
        return min(self._call("free_disk_bytes", folder))

    def allocate(self, sizes: PoolSizes, place: CachePlace | None) -> list[tuple[int, int, int]]:
        """See `RankGroup.allocate`; one rank after the other, as `Rank.allocate` wants it."""
        allocated = [
            self._wait([actor.allocate.remote(sizes, place)], rank)[0] for rank, actor in enumerate(self._actors)
        ]
        self._relay_logs()
        return allocated

    def bandwidth(self) -> list[Bandwidth]:
        """See `RankGroup.bandwidth`."""
        return self._call("bandwidth")

    def start(self, main: LeaderMain, *arguments: Any) -> None:
        """Starts the loops of all ranks; rank 0 runs `main`, given by reference, so it must be importable there."""
        self._heard()
        leader, *followers = self._actors
        self._mains = [leader.lead.remote(main, arguments)]
        for actor, address in zip(followers, self._plan_addresses, strict=True):
            self._mains.append(actor.follow.remote(address))
        self._drain_watch = DrainWatch((node.node_id for node in self.nodes), KINDS[self.device].resource)

    @property
    def notice(self) -> Notice | None:
        """That one of the nodes is about to go, if the cluster says so."""
        return None if self._drain_watch is None else self._drain_watch.notice

    def rank_on(self, node_id: str) -> int:
        """The first rank on a node."""
        return next(rank for rank, node in enumerate(self.nodes) if node.node_id == node_id)

    def check(self) -> None:
        """Raises WorkerDied when a rank has ended, by a DistKVError of its own if that was why, within DEATHS_SETTLE;
        else returns at once."""
        ended, _ = ray.wait(self._mains, num_returns=1, timeout=0)
        if ended:
            self._blame()

    def check_stopped(self) -> None:
        """Raises WorkerDied for a rank whose process does not run. To be called while an engine starts, every now and
        then as long as nothing comes of it: this looks after half of `hang_timeout`, and believes what it finds twice,
        since a debugger stops a process for a moment to look at it."""
        if not self.nodes or time.monotonic() < self._next_look:
            return
        found = stopped_ranks(self._process_states(), self.nodes)
        for rank in sorted(found.keys() & self._stopped):
            raise WorkerDied(
                rank, self.nodes[rank].host,
                f"{found[rank]}, and nothing has come of the ranks for hang_timeout, which is {self._hang_timeout:g} s",
            )  # fmt: skip
        self._heard()
        self._stopped = set(found)

    def _heard(self) -> None:
        """Something has come of the ranks."""
        self._stopped = set()
        self._next_look = time.monotonic() + self._hang_timeout / 2

    def blame_for_hang(self, seconds: float) -> NoReturn:
        """Raises WorkerDied for the rank that `hung_rank` says. To be called when nothing has come of the ranks for so
        many seconds."""
        rank, why = hung_rank(self._process_states(), self.nodes)
        raise WorkerDied(
            rank, self.nodes[rank].host,
            f"nothing has come of the ranks for {seconds:.0f} s, which is hang_timeout and more beyond what they ever "
            f"took, and {why}",
        )  # fmt: skip

    def is_finished(self) -> bool:
        """Whether all ranks have left their loops, as they were asked to; what they have logged since is logged here
        then. Raises WorkerDied when one has failed instead. Returns at once."""
        ended, running = ray.wait(self._mains, num_returns=self.size, timeout=0)
        if any(failure_of(ref) for ref in ended):
            self._blame()
        if running:
            return False
        for rank, lines in enumerate(ray.get(self._mains)):
            relay(lines, rank)
        return True

    def close(self) -> None:
        """Ends the ranks and gives back what the group took of the cluster. A second call does nothing."""
        actors, self._actors = self._actors, []
        placement, self._placement = self._placement, None
        try:
            if self._drain_watch is not None:
                self._drain_watch.close()
            for actor in actors:
                ray.kill(actor, no_restart=True)
            _await_deaths(actors)
            if placement is not None:
                remove_placement_group(placement)
        finally:
            if self._connected:
                self._connected = False
                disconnect()

    def _blame(self) -> NoReturn:
        """Raises WorkerDied for the rank whose end explains that of the others: a process that is gone explains the
        broken connections of the rest, and one that left its loop in peace explains nothing."""
        deadline = time.monotonic() + DEATHS_SETTLE
        for num_ended in range(1, self.size + 1):
            ended, _ = ray.wait(self._mains, num_returns=num_ended, timeout=max(0.0, deadline - time.monotonic()))
            failures = {self._mains.index(ref): failure_of(ref) for ref in ended}
            if len(ended) < num_ended or any(map(_explains, failures.values())):
                break
        # a process that has died may be why another rank says that something is wrong
        first = min(
            failures,
            key=lambda rank: (not isinstance(failures[rank], RayActorError), not _explains(failures[rank]),
                              failures[rank] is None, rank),
        )  # fmt: skip
        error = self._died(first, failures[first])
        if isinstance(error, WorkerDied):
            raise error
        raise WorkerDied(first, self.nodes[first].host, f"{type(error).__name__}: {error}") from error

    def _process_states(self) -> list[str]:
        """Of each rank, as `process_states` has them; "" where its node does not tell."""
        pids: dict[str, list[int]] = {}
        for node in self.nodes:
            pids.setdefault(node.node_id, []).append(node.pid)
        told: dict[str, Any] = {}
        for node_id, own in pids.items():
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0)(process_states).options(scheduling_strategy=there)
            told[node_id] = task.remote(own)
        ready, _ = ray.wait(list(told.values()), num_returns=len(told), timeout=STATES_TIMEOUT)
        found: dict[tuple[str, int], str] = {}
        for node_id, ref in told.items():
            if ref in ready and failure_of(ref) is None:
                found |= {(node_id, pid): state for pid, state in zip(pids[node_id], ray.get(ref), strict=True)}
        return [found.get((node.node_id, node.pid), "") for node in self.nodes]

    def _relay_logs(self) -> None:
        for rank, lines in enumerate(self._call("take_log")):
            relay(lines, rank)

    def _place(self, fewer: Fewer | None) -> None:
        kind = KINDS[self.device].resource
        placed = place(kind, self.size, fewer, self._check_wanted, self._num_stages)
        self._placement, self.size = placed.group, placed.size
        actor_class = ray.remote(RankActor)
        for rank in range(self.size):
            bundle = placed.bundle(rank)
            strategy_of_rank = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundle)
            options = {
                "num_cpus": int(kind == "CPU"),
                "num_gpus": int(kind == "GPU"),
                "max_restarts": 0,
                "scheduling_strategy": strategy_of_rank,
                "runtime_env": {"env_vars": _passed_environment()},
            }
            self._actors.append(actor_class.options(**options).remote())

    def _tell_places(self, hosts: dict[str, str]) -> None:
        """Says where the ranks lie, if that is not one node: a warning where sums cross a network."""
        of_stage = self.size // self._num_stages
        stages = [
            Counter(node.node_id for node in self.nodes[at : at + of_stage]) for at in range(0, self.size, of_stage)
        ]
        if len(self._ranks_per_node()) == 1:
            return
        for number, stage in enumerate(stages):
            places = ", ".join(f"{count} on {hosts[node_id]}" for node_id, count in stage.items())
            of_it = "all" if len(stages) == 1 else f"stage {number} with its"
            if len(stage) > 1:
                log.warning("no node has room for %s %d ranks: %s", of_it, of_stage, places)
            else:
                log.info("stage %d lies on %s", number, hosts[next(iter(stage))])

    def _for_node(self, config: RankConfig, rank: int) -> RankConfig:
        """The config of a rank with its number of threads: Ray itself gives an actor one."""
        node = self.nodes[rank]
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        num_ranks = self._ranks_per_node()[node.node_id] * -(-self._num_groups // num_nodes)
        shared = max(1, node.num_cpus // num_ranks)
        return replace(config, num_threads=config.num_threads or shared)

    def _ranks_per_node(self) -> Counter[str]:
        return Counter(node.node_id for node in self.nodes)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait([getattr(actor, method).remote(*arguments) for actor in self._actors])

    def _wait(self, refs: list[Any], first: int = 0) -> list[Any]:
        """The results of a call for each rank from `first` on; the first failure is raised at once, whatever the others
        still do. A call may take as long as it likes, where its process runs."""
        self._heard()
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=CHECK_SECONDS)
            self._check_wanted()
            for ref in done:
                error = failure_of(ref)
                if error is not None:
                    raise self._died(first + refs.index(ref), error)
            if done:
                self._heard()
            else:
                self.check_stopped()
        return ray.get(refs)

    def _died(self, rank: int, error: Exception | None) -> DistKVError:
        """The error to raise for what ended a rank."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, DistKVError):
            return cause
        known = "it left its loop" if error is None else cause_of(error)
        if "ModuleNotFoundError" in str(error):
            return ConfigError(
                f"the cluster's workers cannot import what distkv needs ({known}); install distkv on every node, or "
                "submit with `ray job submit --working-dir` from a checkout"
            )
        if not self.nodes and error is not None and tokens_differ(error):
            return ConfigError(TOKENS_DIFFER)
        host = self.nodes[rank].host if rank < len(self.nodes) else "unknown"
        return WorkerDied(rank, host, known)


def _explains(failure: Exception | None) -> bool:
    """Whether it is known why a rank has ended: its process has died, or it says itself what is wrong."""
    return isinstance(failure, RayActorError) or isinstance(getattr(failure, "cause", None), DistKVError)


def _await_deaths(actors: list[Any]) -> None:
    """Waits until killed actors are gone, so that nothing of a group outlives `close`."""
    for actor in actors:
        try:
            ray.get(actor.node.remote(), timeout=DEATH_TIMEOUT)
        except (RayError, GetTimeoutError):
            continue


def _passed_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ENVIRONMENT or name.startswith(PASSED_PREFIXES)
    }
