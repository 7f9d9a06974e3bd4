"""Engines on a cluster: the real pool, `RayEngine` and what the leader of a group runs, over ranks and connections that
are made up."""

from types import SimpleNamespace
from typing import Any, NoReturn

from msgspec.structs import replace
from simulation.driver import Driver
from simulation.executor import SimulatedExecutor, StepFault, StepThread
from simulation.node import Node
from simulation.shape import Faults
from simulation.sockets import Threads, connect, fake_zmq, wait_for
from simulation.world import Killed, Process, Task, World

from distkv.engine import step_runner
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo
from distkv.errors import CapacityError, DistKVError, StoreError, WorkerDied
from distkv.launch import leader, pool, ray_engine, watchdog
from distkv.launch.pool import EnginePool
from distkv.launch.ray_engine import RayEngine
from distkv.workers.group import drain_watch
from distkv.workers.group.drain_watch import Notice

HANG_TIMEOUT = 60.0  # seconds
TURN = 100  # milliseconds for which a pool waits in a step; messages that come end it
LOADING = 8.0  # seconds that a group takes to load at most


class SimulatedGroup:
    """A `RayGroup` as its engine sees it."""

    def __init__(self, cluster: "ClusterRun", node: Node):
        world = self.world = cluster.world
        self.cluster, self.node = cluster, node
        self.process = Process(world)
        self.task: Task | None = None
        self.executor: SimulatedExecutor | None = None
        self.engine: Engine | None = None
        self.notice: Notice | None = None
        self._known_at = 0.0  # when Ray tells of a death
        self.process.at_death.append(self._note_death)

    def start(self, main: Any, *arguments: Any) -> None:
        """See `RayGroup.start`."""
        faults = self.cluster.faults
        self.request_address, socket = connect(self.world, self.process)
        self.executor = self.cluster.make_executor(self.process, self.node)
        self.executor.step_faults = faults.steps / 4
        self.executor.device_faults, self.executor.hangs = faults.device, faults.hangs
        self.executor.group = self
        self.task = self.world.spawn(lambda: main(self.executor, socket, list, *arguments))
        self.task.process = self.process

    def check(self) -> None:
        """See `RayGroup.check`."""
        self._raise_failure()
        if self.process.is_dead and self.world.now >= self._known_at:
            raise WorkerDied(0, "node", "its process was killed")

    def check_stopped(self) -> None:
        """See `RayGroup.check_stopped`: processes of hanging ranks run."""

    def is_finished(self) -> bool:
        """See `RayGroup.is_finished`."""
        self.check()
        assert self.task is not None
        return self.task.is_done and not self.process.is_dead

    def blame_for_hang(self, seconds: float) -> NoReturn:
        """See `RayGroup.blame_for_hang`."""
        assert self.executor is not None
        assert self.executor.is_stuck, f"the group goes on and is blamed after {seconds} s"
        raise WorkerDied(0, "node", f"nothing has come of the ranks for {seconds:.0f} s")

    def drain(self) -> None:
        """The node is about to go, and goes."""
        world, rng = self.world, self.world.rng
        seconds = rng.choice([2.0, 20.0, 100.0])
        self.notice = Notice("node", world.now, world.now + seconds, rng.random() < 0.5)
        world.count("node drained")

        def go() -> None:
            world.sleep(seconds)
            self.process.kill("the node is gone")

        world.spawn(go)

    def close(self) -> None:
        """See `RayGroup.close`."""
        self.process.kill("closed" if self.task is not None and self.task.is_done else "ended by its owner")
        if self in self.cluster.groups:
            self.cluster.groups.remove(self)

    def _note_death(self) -> None:
        self._known_at = self.world.now + self.world.rng.choice([0.0, 0.05, 2.0])

    def _raise_failure(self) -> None:
        """What has ended the leader."""
        error = None if self.task is None else self.task.error
        if error is None or isinstance(error, Killed):
            return
        if isinstance(error, StepFault) or self.world.counts["device fault"]:
            self.process.kill("it failed")
            raise WorkerDied(0, "node", f"{type(error).__name__}: {error}")
        if isinstance(error, DistKVError) and not isinstance(error, WorkerDied):
            raise WorkerDied(0, "node", f"{type(error).__name__}: {error}") from error
        raise error


class ClusterRun(Driver):
    """A pool after the other, of one or two engines."""

    client: EnginePool | None
    patience = 20_000  # turns, which is several deaths and hangs

    def __init__(self, world: World):
        super().__init__(world)
        self.num_engines = world.rng.choice([1, 1, 2])
        folder = self.nodes[0].folder
        self.nodes = [Node(world, folder / f"engine-{number}") for number in range(self.num_engines)]
        for node in self.nodes:
            node.folder.mkdir()
        self.groups: list[SimulatedGroup] = []
        self.max_failures = world.rng.choice([1_000_000, 1_000_000, 1_000_000, 2])  # in 600 s
        self.has_room = True  # the cluster
        self._num_plans = 0  # at the last turn

    def explained(self, faults: Faults) -> set[str]:
        is_lost = faults.kills or faults.steps or faults.device or faults.hangs or faults.drains
        return super().explained(faults) | ({"DistKVError"} if is_lost else set())

    def patches(self) -> list[tuple[Any, str, Any]]:
        world, zmq = self.world, fake_zmq(self.world)

        def make_engine(info: Any, executor: SimulatedExecutor, **options: Any) -> Engine:
            executor.group.engine = Engine(info, executor, **options)
            return executor.group.engine

        idle = SimpleNamespace(is_due=False)
        return [
            *((module, "time", world.time) for module in (pool, ray_engine, watchdog, leader, drain_watch)),
            (pool, "STEP_WAIT", TURN),
            (pool, "zmq", zmq), (ray_engine, "zmq", zmq),
            (pool, "ThreadPoolExecutor", lambda *_: Threads(world)),
            (pool, "wait", lambda *arguments: wait_for(world, *arguments)),
            (ray_engine, "connect_private", lambda _, address: address),
            (leader, "RayMetrics", lambda *_: idle),
            (leader, "Engine", make_engine),
            (step_runner, "ThreadPoolExecutor", lambda *_: StepThread(world, self.pace)),
        ]  # fmt: skip

    def heal(self) -> None:
        super().heal()
        self.has_room = True
        for group in self.groups:
            if group.executor is not None:
                group.executor.step_faults = group.executor.device_faults = group.executor.hangs = 0.0

    def engines(self) -> list[Engine]:
        return [group.engine for group in self.groups if group.engine is not None and not group.process.is_dead]

    def close(self) -> None:
        assert self.client is not None
        client, self.client = self.client, None
        try:
            client.close()
        except WorkerDied:
            assert self.explained(self.given) >= {"DistKVError"}, "no rank was lost"
        except StoreError:  # they did not get on with saving
            assert self.world.counts["hang"]
        assert not self.groups, "a group outlives its pool"
        self.check_left()

    def _turn(self, accepts: bool) -> None:
        try:
            self._try_turn(accepts)
        except WorkerDied:
            assert self.max_failures < 1_000_000, "it is to be made good"
            self.world.count("too many ranks lost")
            self.close()
            for request_id in list(self.callers.open):
                self.callers.abort(request_id, None)

    def _try_turn(self, accepts: bool) -> None:
        world = self.world
        if self.client is None:
            try:
                self.client = EnginePool(
                    self._start, self.num_engines, self.max_failures, 1e9, lambda: None, lambda: None
                )
            except (CapacityError, WorkerDied):
                world.count("start failed")
                self.has_room = True
                return
            world.count("starts")
        if world.counts["plans"] != self._num_plans or world.chance(0.005):  # while groups start, little happens
            self._num_plans = world.counts["plans"]
            self._kill()
            self.befall()
            if accepts:
                self.callers_act()
        if not self.has_room and world.chance(0.01):
            self.has_room = True
        self.step(accepts)
        for group in self.groups:
            if group.process.is_dead and group.task is not None and group.task.is_done:
                self.check_left()

    def _kill(self) -> None:
        """A group loses a rank, or the cluster room."""
        world, faults = self.world, self.faults
        if self.groups and world.chance(faults.kills):
            process = world.rng.choice(self.groups).process
            world.count("killed")
            if world.chance(0.3):
                process.kill("from outside")
            elif process.fuse is None:
                process.fuse = world.rng.choice([1, 2, 10, 100, 300])
        if self.groups and world.chance(faults.drains):
            group = world.rng.choice(self.groups)
            if group.notice is None:
                group.drain()
        if world.chance(faults.room):
            self.has_room = False

    def _start(self, number: int, is_anew: bool, check: Any) -> RayEngine:
        """What `_launch_on_ray` does."""
        world = self.world
        group = SimulatedGroup(self, self.nodes[number])
        world.sleep(world.rng.random() * LOADING)
        check()
        if not self.has_room:
            world.count("no room in the cluster")
            raise CapacityError("1 CPUs were not free within 60 s, 0 are now")
        if world.chance(self.faults.kills):
            group.process.fuse = world.rng.randint(1, 30)
        self.groups.append(group)
        return RayEngine(group, self._info(number), None, HANG_TIMEOUT, leaves=False)  # type: ignore[arg-type]

    def _info(self, number: int) -> EngineInfo:
        folder = None if self.info.cache_dir is None else str(self.nodes[number].folder)
        return replace(self.info, cache_dir=folder)
