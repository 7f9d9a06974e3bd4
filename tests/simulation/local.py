"""One engine in one process, which may die and be started again over what lies on disk."""

from typing import Any

from simulation.driver import Driver
from simulation.executor import SimulatedExecutor, StepFault, StepThread
from simulation.shape import Faults
from simulation.world import Killed, Process, World

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, StepOutput
from distkv.engine.replay import Replay
from distkv.errors import DistKVError


class ReplayingEngine(Engine):
    """An engine whose requests may have been begun by an earlier one."""

    replays: dict[str, Replay]

    def add(self, requests: list[EngineRequest]) -> None:
        super().add(requests)
        self.replays |= {request.request_id: Replay(request) for request in requests}

    def add_again(self, replays: dict[str, Replay]) -> None:
        """Goes on with what another one has begun."""
        self.replays = replays
        super().add([replay.run() for replay in replays.values()])
        super().abort([(name, index) for name, replay in replays.items() for index in replay.closed])

    def abort(self, answers: Any, reason: str = "abort") -> None:
        answers = list(answers)
        super().abort(answers, reason)
        if reason == "abort":
            for request_id, index in answers:
                if request_id in self.replays:
                    self.replays[request_id].close(index)

    def step(self) -> list[StepOutput]:
        passed = [self.replays[output.request_id].pass_on(output) for output in super().step()]
        return [output for output in passed if output is not None]


class LocalRun(Driver):
    """A process after the other, each with an engine."""

    client: ReplayingEngine | None

    def __init__(self, world: World):
        super().__init__(world)
        self.replays: dict[str, Replay] = {}
        self.executor: SimulatedExecutor | None = None
        self.ends_at: int | None = None  # the point at which the first process ends, if chance is not to say

    def explained(self, faults: Faults) -> set[str]:
        return super().explained(faults) | ({"DistKVError"} if faults.steps else set())

    def heal(self) -> None:
        super().heal()
        if self.executor is not None:
            self.executor.step_faults = self.executor.device_faults = 0.0

    def engines(self) -> list[Engine]:
        return [] if self.client is None else [self.client]

    def close(self) -> None:
        assert self.client is not None
        engine, self.client = self.client, None
        engine.close()
        self.process.kill("closed")
        self.check_left()

    def _turn(self, accepts: bool) -> None:
        try:
            if self.client is None:
                self._start()
            self.befall()
            if self.world.chance(self.faults.kills) and self.process.fuse is None:
                self.process.fuse = self.world.rng.choice([1, 2, 10, 100, 300])
            if accepts:
                self.callers_act()
            self.step(accepts)
        except Killed:
            self._die()
        except StepFault:  # of a plan that belongs to no request
            self._lose_requests()
        except DistKVError as error:
            if not self.world.counts["device fault"]:
                raise
            self.world.note("device", str(error))
            self.process.kill("a device has failed")
            self._die()

    def _start(self) -> None:
        """A new process takes over what lies there."""
        world = self.world
        self.process = Process(world)
        [node] = self.nodes
        executor = self.executor = self.make_executor(self.process, node)
        executor.step_faults, executor.device_faults = self.faults.steps, self.faults.device
        if world.chance(self.faults.kills):
            self.process.fuse = world.rng.randint(1, 30)
        if self.ends_at is not None:
            self.process.fuse, self.ends_at = self.ends_at, None
        engine = ReplayingEngine(self.info, executor, thread=StepThread(world, self.pace))
        world.count("starts")
        engine.add_again(self.replays)
        self.client = engine

    def _die(self) -> None:
        """The process has ended; what lies on disk is left, and some of the callers ask the next one to go on."""
        replays = self.replays if self.client is None else self.client.replays
        self.client = None
        self.check_left()
        for request_id in list(self.callers.open):
            if self.world.chance(0.3) or replays[request_id].num_runs > 3:
                self.callers.abort(request_id, None)
        self.replays = {name: replays[name] for name in self.callers.open}

    def _lose_requests(self) -> None:
        """What a thread of an engine does when a step raises: the requests end, and the engine goes on."""
        if self.client is None:  # it did not even start
            self.process.kill("a step has failed")
            self._die()
            return
        self.client.abort([(request_id, None) for request_id in self.callers.open])
        for request_id in list(self.callers.open):
            self.callers.abort(request_id, None)
