"""A tensor-parallel group of Ray actors: where they are placed, how they start, and how their death is noticed.

Ray starts and ends the ranks and reports deaths. It carries nothing per step: plans go over ZeroMQ, tensors over NCCL
or gloo. The group belongs to the process that made it, and ends with it.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import zmq
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distkv.workers.backend import KINDS
from distkv.workers.bandwidth import Bandwidth
from distkv.workers.errors import CapacityError, ConfigError, DistKVError, WorkerDied
from distkv.workers.group.channel import FollowerChannel, LeaderChannel
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.group.report import Report
from distkv.workers.kv_pools import PoolSizes
from distkv.workers.rank import Capacity, Rank, RankConfig

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT = 60.0  # seconds to wait for resources that others hold
REACH_TIMEOUT = 10.0  # seconds to wait for the cluster's head to take a connection
DEATHS_SETTLE = 1.0  # seconds in which the first of several deaths is told from those that follow from it
# Variables of the caller's environment that reach the ranks.
PASSED_ENVIRONMENT = ("HF_HOME", "TRITON_CACHE_DIR", "TMPDIR")
PASSED_PREFIXES = ("NCCL_", "GLOO_")

LeaderMain = Callable[..., None]
"""What rank 0 runs: `main(rank, followers, request_socket, *arguments)`. Followers end when it returns."""


@dataclass(frozen=True)
class Node:
    """Where a rank runs."""

    node_id: str
    host: str
    num_cpus: int


class RankActor:
    """A rank in a process of its own."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._context.linger = 0
        self._rank: Rank | None = None

    def node(self) -> tuple[str, int]:
        """The id of the node this actor runs on, and the node's cores."""
        return ray.get_runtime_context().get_node_id(), os.cpu_count() or 1

    def open(self, host: str, num_followers: int) -> tuple[str, str, list[str]]:
        """On rank 0: binds the group's sockets; returns torch's init_method, the address for requests and those of the
        plans of each follower."""
        self._followers = LeaderChannel(self._context, host, num_followers)
        self._requests = self._context.socket(zmq.PAIR)
        self._requests.set_hwm(0)
        port = self._requests.bind_to_random_port(f"tcp://{host}")
        return f"tcp://{host}:{_free_port(host)}", f"tcp://{host}:{port}", self._followers.addresses

    def load(self, config: RankConfig, rank: int, size: int, init_method: str) -> None:
        """Joins the process group and loads this rank's part of the model."""
        self._rank = Rank(config, ProcessGroup(rank, size, init_method, KINDS[config.device].collectives))

    def capacity(self, ranks_on_node: int, of_device: bool) -> Capacity:
        """See `Rank.page_capacity`."""
        assert self._rank is not None
        return self._rank.page_capacity(ranks_on_node, of_device)

    def allocate(self, sizes: PoolSizes) -> tuple[int, int, int]:
        """See `Rank.allocate`."""
        assert self._rank is not None
        return self._rank.allocate(sizes)

    def bandwidth(self) -> Bandwidth:
        """See `Rank.bandwidth`."""
        assert self._rank is not None
        return self._rank.bandwidth()

    def lead(self, main: LeaderMain, arguments: tuple[Any, ...]) -> None:
        """On rank 0: runs `main` until it returns, then ends the followers."""
        assert self._rank is not None
        try:
            main(self._rank, self._followers, self._requests, *arguments)
            self._followers.send(None)
            self._followers.receive()  # they have let go of the disk, which rank 0 sweeps
        except BaseException:
            self._rank.close_after_error()
            raise
        self._rank.close()
        self._rank.group.close()

    def follow(self, address: str) -> None:
        """On other ranks: runs plans until the end is sent."""
        assert self._rank is not None
        leader = FollowerChannel(self._context, address)
        self._rank.warm_up()
        while (plan := leader.receive()) is not None:
            self._rank.execute(plan)
            leader.send(self._rank.take_report())
        self._rank.close()
        leader.send(Report())
        self._rank.group.close()


class RayGroup:
    """The ranks of one engine, as their owner sees them; in the order `load`, `allocate`, `start`, `close`."""

    def __init__(self, size: int, address: str | None, device: str):
        """Takes `size` groups of the cluster and starts an actor on each.

        Args:
            address: as `ray.init` takes it; None takes a running cluster or starts one on this machine.
            device: "cuda", "cpu", or "auto" for CUDA when the cluster has a GPU.

        Raises CapacityError when the cluster lacks the resources, ConfigError when it cannot be reached.
        """
        self.size = size
        self._connected = False
        self._placement: Any = None
        self._actors: list[Any] = []
        self._mains: list[Any] = []  # the refs of lead() and follow(): whoever of them ends too early has died
        self.nodes: list[Node] = []
        self.request_address = ""
        try:
            _connect(address, size)
            self._connected = True
            total = ray.cluster_resources()
            self.device = ("cuda" if total.get("GPU", 0) >= 1 else "cpu") if device == "auto" else device
            self._place()
            hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            self.nodes = [Node(node_id, hosts[node_id], num_cpus) for node_id, num_cpus in self._call("node")]
        except BaseException:
            self.close()
            raise

    def load(self, config: RankConfig) -> None:
        """Loads the model on all ranks; raises ConfigError or WorkerDied when one cannot."""
        here = ray.get_runtime_context().get_node_id()
        alone = all(node.node_id == here for node in self.nodes)
        host = "127.0.0.1" if alone else self.nodes[0].host
        opened = self._wait([self._actors[0].open.remote(host, self.size - 1)])[0]
        init_method, self.request_address, self._plan_addresses = opened
        refs = []
        for rank, actor in enumerate(self._actors):
            refs.append(actor.load.remote(self._for_node(config, rank), rank, self.size, init_method))
        self._wait(refs)

    def capacity(self, of_device: bool) -> Capacity:
        """Pages that fit on the rank with the least room, see `Rank.page_capacity`."""
        per_node = self._ranks_per_node()
        rooms = self._wait(
            [
                actor.capacity.remote(per_node[node.node_id], of_device)
                for actor, node in zip(self._actors, self.nodes, strict=True)
            ]
        )
        tightest = min(rooms, key=lambda room: room.device)
        return Capacity(tightest.device, min(room.host for room in rooms), tightest.budget)

    def allocate(self, sizes: PoolSizes) -> list[tuple[int, int, int]]:
        """Makes the pools of all ranks; returns the bytes of each tier for each."""
        return [self._wait([actor.allocate.remote(sizes)])[0] for actor in self._actors]

    def bandwidth(self) -> list[Bandwidth]:
        """How fast each rank gets cold pages, all of them at once."""
        return self._call("bandwidth")

    def start(self, main: LeaderMain, *arguments: Any) -> None:
        """Starts the loops of all ranks; rank 0 runs `main`, given by reference, so it must be importable there."""
        leader, *followers = self._actors
        self._mains = [leader.lead.remote(main, arguments)]
        for actor, address in zip(followers, self._plan_addresses, strict=True):
            self._mains.append(actor.follow.remote(address))

    def check(self) -> None:
        """Raises WorkerDied when a rank has ended. Returns at once."""
        done, _ = ray.wait(self._mains, num_returns=1, timeout=0)
        if not done:
            return
        done, _ = ray.wait(self._mains, num_returns=self.size, timeout=DEATHS_SETTLE)
        failures = [(self._mains.index(ref), _failure(ref)) for ref in done]
        # a process that is gone explains the broken connections of the others, not the other way round
        failures.sort(key=lambda failure: (not isinstance(failure[1], RayActorError), failure[0]))
        raise self._died(*failures[0])

    def close(self) -> None:
        """Ends the ranks and gives back what the group took of the cluster. A second call does nothing."""
        actors, self._actors = self._actors, []
        placement, self._placement = self._placement, None
        try:
            for actor in actors:
                ray.kill(actor, no_restart=True)
            _await_deaths(actors)
            if placement is not None:
                remove_placement_group(placement)
        finally:
            if self._connected:
                self._connected = False
                _disconnect()

    def finish(self, timeout: float) -> None:
        """Waits until the ranks have left their loops, for `timeout` seconds at most."""
        ray.wait(self._mains, num_returns=len(self._mains), timeout=timeout)

    def _place(self) -> None:
        kind = KINDS[self.device].resource
        nodes = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
        if sum(int(count) for count in nodes) < self.size:
            raise CapacityError(
                f"tensor_parallel_size {self.size} needs {self.size} {kind}s and the cluster has {int(sum(nodes))}; "
                f"use fewer ranks, or add nodes (`ray start --num-{kind.lower()}s=N` says how many a node offers)"
            )
        bundle = {kind: 1}
        strategy = "STRICT_PACK" if max(nodes) >= self.size else "PACK"
        self._placement = placement_group([bundle] * self.size, strategy=strategy)
        try:
            ray.get(self._placement.ready(), timeout=PLACEMENT_TIMEOUT)
        except GetTimeoutError:
            free = ray.available_resources().get(kind, 0)
            raise CapacityError(
                f"{self.size} {kind}s were not free within {PLACEMENT_TIMEOUT:.0f} s, {int(free)} are now; "
                "end what holds them or use fewer ranks"
            ) from None
        actor_class = ray.remote(RankActor)
        for index in range(self.size):
            strategy_of_rank = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
            options = {
                "num_cpus": bundle.get("CPU", 0),
                "num_gpus": bundle.get("GPU", 0),
                "max_restarts": 0,
                "scheduling_strategy": strategy_of_rank,
                "runtime_env": {"env_vars": _passed_environment()},
            }
            self._actors.append(actor_class.options(**options).remote())

    def _for_node(self, config: RankConfig, rank: int) -> RankConfig:
        """The config of a rank with its threads settled: Ray itself gives an actor one."""
        node = self.nodes[rank]
        shared = max(1, node.num_cpus // self._ranks_per_node()[node.node_id])
        return replace(config, num_threads=config.num_threads or shared)

    def _ranks_per_node(self) -> Counter[str]:
        return Counter(node.node_id for node in self.nodes)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait([getattr(actor, method).remote(*arguments) for actor in self._actors])

    def _wait(self, refs: list[Any]) -> list[Any]:
        """The results of one call per rank; the first failure is raised at once, whatever the others still do."""
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            error = _failure(done[0])
            if error is not None:
                raise self._died(refs.index(done[0]), error)
        return ray.get(refs)

    def _died(self, rank: int, error: Exception | None) -> DistKVError:
        """The error to raise for what ended a rank."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, DistKVError):
            return cause
        known = "it left its loop" if error is None else _cause(error)
        if "ModuleNotFoundError" in str(error):
            return ConfigError(
                f"the cluster's workers cannot import what distkv needs ({known}); install distkv on every node, or "
                "submit with `ray job submit --working-dir` from a checkout"
            )
        host = self.nodes[rank].host if rank < len(self.nodes) else "unknown"
        return WorkerDied(rank, host, known)


class _Connection:
    """This process's connection to Ray, which all its groups share: whether distkv made it, and how many use it."""

    made_here = False
    users = 0


def _connect(address: str | None, size: int) -> None:
    if not ray.is_initialized():
        _init(address or os.environ.get("RAY_ADDRESS"), size)
        _Connection.made_here = True
    _Connection.users += 1


def _disconnect() -> None:
    """Ends the connection with its last user, unless it was there before."""
    _Connection.users -= 1
    if not _Connection.users and _Connection.made_here:
        _Connection.made_here = False
        ray.shutdown()


def _init(address: str | None, size: int) -> None:
    found = _running_cluster() if address in (None, "auto") else address
    if found is None and address == "auto":
        raise ConfigError("no Ray cluster runs on this machine; start one with `ray start --head`")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if found in (None, "local"):
        log.info("starting a Ray cluster on this machine for this process")
        ray.init(address="local", num_cpus=max(size, os.cpu_count() or 1), include_dashboard=False, **quiet)
        return
    assert found is not None
    _check_reachable(found)
    try:
        ray.init(address=found, **quiet)
    except (RayError, RuntimeError, ValueError, ConnectionError) as error:
        raise ConfigError(
            f"the Ray cluster at {found!r} cannot be joined ({_cause(error)}); "
            "is it running, and is its token in ~/.ray/auth_token here?"
        ) from error


def _running_cluster() -> str | None:
    """The cluster that `ray start` began last on this machine, if it still answers.

    Ray notes its address in a file that outlives a killed cluster, and would itself try that address for minutes.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
        _check_reachable(address)
    except (OSError, ConfigError):
        return None
    return address


def _await_deaths(actors: list[Any]) -> None:
    """Waits until killed actors are gone, so that nothing of a group outlives `close`."""
    for actor in actors:
        try:
            ray.get(actor.node.remote(), timeout=5)
        except (RayError, GetTimeoutError):
            continue


def _check_reachable(address: str) -> None:
    """Raises ConfigError when nothing listens at `host:port`; Ray itself would go on trying for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray_address {address!r} is a Ray client's, and distkv must run inside the cluster's network; "
            "run it on a node with ray_address='auto', or as a job with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"ray_address is {address!r}; give host:port, 'auto' or 'local'")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at ray_address {address!r} ({error}); is it running?") from error


def _failure(ref: Any) -> Exception | None:
    """What a finished call ended with, or None when it returned."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _cause(error: BaseException) -> str:
    """What is known of why a call failed, in a line."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not isinstance(error, ActorDiedError):
        return lines[-1]
    # Ray's own account, without its list of common causes
    known = next((line for line in lines if line.startswith("The actor is dead")), lines[0])
    return known.partition(" Some common causes")[0].rstrip(".")


def _passed_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ENVIRONMENT or name.startswith(PASSED_PREFIXES)
    }


def _free_port(host: str) -> int:
    """A port that torch's rendezvous can bind a moment later."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
