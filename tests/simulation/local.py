"""One engine in one process, which may die and be started again over what lies on disk."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from simulation.answers import Callers
from simulation.catalogues import Catalogues, break_catalogue, check_catalogue, patches
from simulation.disk import Disk
from simulation.executor import SimulatedExecutor, StepFault, StepThread
from simulation.model import PlainModel
from simulation.shape import Faults, any_faults, any_info, make_ranks
from simulation.workload import Workload
from simulation.world import Hung, Killed, Process, World

from distkv.engine.engine import Engine
from distkv.engine.replay import Replay
from distkv.errors import CapacityError, DistKVError

PATIENCE = 3000  # steps in which something must come of what is to be done


class LocalRun:
    """A process after the other, each with an engine."""

    def __init__(self, world: World, faults: Faults | None = None):
        self.world = world
        rng = world.rng
        self._cleanup = ExitStack()
        self.folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        self.info = any_info(rng, str(self.folder))
        self.faults = any_faults(rng) if faults is None else faults
        self.num_heads, self.num_ranks = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
        self.model = PlainModel(self.num_heads, self.info.page_size)
        self.disk = Disk(world)
        self.catalogues = Catalogues(world)
        self.workload = Workload(rng, self.info)
        self.callers = Callers(world, self.info, self.model, errors_of(self.faults))
        self.replays: dict[str, Replay] = {}
        self.pace = rng.choice([0.002, 0.02, 1.5])
        self.engine: Engine | None = None
        self.executor: SimulatedExecutor | None = None
        self._idle_steps = 0
        self._outgoing = 0
        for module, name, replacement in patches(world, self.catalogues):
            self._cleanup.enter_context(patch.object(module, name, replacement))

    def run(self, num_plans: int) -> None:
        """Goes on until the ranks have run so many plans, and to the end of what was begun then."""
        with self._cleanup:
            while self.world.counts["plans"] < num_plans:
                self._turn(accepts=True)
            self.faults = Faults()
            self._heal()
            while self.engine is None or self.engine.has_work:
                self._turn(accepts=False)
            assert not self.callers.open, "nothing is to be done, and not all are answered"
            self._check_idle()
            self._close()

    # --- turns ---

    def _turn(self, accepts: bool) -> None:
        try:
            if self.engine is None:
                self._start()
            self._befall()
            if accepts:
                self._callers_act()
            self._step(accepts)
        except Killed:
            self._die()
        except StepFault:  # of a plan that belongs to no request
            self._lose_requests()

    def _start(self) -> None:
        """A new process takes over what lies there."""
        world = self.world
        if not self.info.enable_prefix_caching:
            self.disk.files.clear()
        if world.chance(self.faults.broken_catalogue):
            break_catalogue(world, self.folder)
            self.catalogues.is_true = False
        self.process = Process(world)
        self.catalogues.process = self.process
        ranks = make_ranks(world, self.process, self.info, self.disk, self.num_heads, self.num_ranks)
        executor = self.executor = SimulatedExecutor(world, self.process, self.info, ranks)
        executor.step_faults, executor.device_faults = self.faults.steps, self.faults.device
        thread = StepThread(world)
        thread.pace = self.pace
        if world.chance(self.faults.kills):
            self.process.fuse = world.rng.randint(1, 30)
        self.engine = Engine(self.info, executor, thread=thread)
        world.count("starts")
        again = [replay for replay in self.replays.values() if replay.is_open]
        self.engine.add([replay.run() for replay in again])
        self.engine.abort([(one.request.request_id, index) for one in again for index in one.closed])

    def _befall(self) -> None:
        """What goes wrong now."""
        world, faults = self.world, self.faults
        if world.chance(faults.kills) and self.process.fuse is None:
            self.process.fuse = world.rng.choice([1, 2, 10, 100, 300])
        if world.chance(faults.damage):
            self.disk.damage()
        if world.chance(faults.disk):
            self._change_disk()
        if world.chance(faults.catalogue):
            self.catalogues.is_locked = not self.catalogues.is_locked

    def _change_disk(self) -> None:
        rng, disk = self.world.rng, self.disk
        kind = rng.choice(["full", "full", "unreliable", "slow", "well", "well"])
        self.world.count(f"disk is {kind}")
        if kind == "full":
            disk.fill_up()
        elif kind == "unreliable":
            disk.read_faults, disk.write_faults = rng.choice([0.0, 0.03, 0.3]), rng.choice([0.0, 0.03, 0.3])
        elif kind == "slow":
            disk.slowness = rng.choice([10.0, 1000.0])
        else:
            disk.heal()

    def _heal(self) -> None:
        self.disk.heal()
        self.catalogues.is_locked = False
        if self.executor is not None:
            self.executor.step_faults = self.executor.device_faults = 0.0

    def _callers_act(self) -> None:
        assert self.engine is not None
        world, rng = self.world, self.world.rng
        if world.chance(self.workload.busy) and len(self.callers.open) < 12:
            self._send()
        if self.callers.open and world.chance(0.02):
            request_id = rng.choice(list(self.callers.open))
            index = rng.choice([None, *range(self.callers.open[request_id].request.params.n)])
            self.engine.abort([(request_id, index)])
            self.replays[request_id].close(index)
            self.callers.abort(request_id, index)
            world.count("aborted")
        if world.chance(0.002):
            self.engine.reset_prefix_cache()
        if world.chance(0.005):
            self.engine.stats()

    def _send(self) -> None:
        assert self.engine is not None
        requests = [self.workload.request() for _ in range(self.world.rng.choice([1, 1, 1, 3]))]
        try:
            self.engine.add(requests)
        except CapacityError:
            self.world.count("refused")
            return
        for request in requests:
            self.replays[request.request_id] = Replay(request)
            self.callers.sent(request)

    def _step(self, accepts: bool) -> None:
        assert self.engine is not None
        if not self.engine.has_work:
            self._rest()
            if accepts and self.engine is not None:
                self._send()
            return
        try:
            outputs = self.engine.step()
        except DistKVError as error:
            if not self.world.counts["device fault"]:
                raise
            self.world.note("device", str(error))
            self.process.kill("a device has failed")
            raise Killed from error
        passed = [self.replays[output.request_id].pass_on(output) for output in outputs]
        self._take([output for output in passed if output is not None])
        self._idle_steps = 0 if outputs else self._idle_steps + 1
        if self._idle_steps > PATIENCE:
            raise Hung(f"{PATIENCE} steps without a token")

    def _take(self, outputs: list) -> None:  # type: ignore[type-arg]
        for caller in self.callers.take(outputs):
            self.replays.pop(caller.request.request_id)
            self.workload.said(caller.request, caller.answers[0].tokens)

    def _rest(self) -> None:
        """Nothing is to be done."""
        self._idle_steps = 0
        assert not self.callers.open, "nothing is to be done, and not all are answered"
        if self.world.chance(0.3):
            self._check_idle()
        if self.world.chance(0.03):
            self._close()
        else:
            self.world.sleep(self.world.rng.random())

    def _check_idle(self) -> None:
        assert self.engine is not None
        self.world.count("idle checks")
        self.engine.integrity_check()
        stats = self.engine.stats()
        assert stats.num_running == stats.num_waiting == stats.pages_in_use == 0

    def _close(self) -> None:
        """The process ends as it should."""
        assert self.engine is not None
        engine, self.engine = self.engine, None
        engine.close()
        self.process.kill("closed")
        self._check_left()

    def _die(self) -> None:
        """The process has ended; what lies on disk is left, and some of the callers ask the next one to go on."""
        self.engine = None
        self._check_left()
        for request_id in list(self.callers.open):
            if self.world.chance(0.3) or self.replays[request_id].num_runs > 3:
                self.callers.abort(request_id, None)
        self.replays = {name: replay for name, replay in self.replays.items() if name in self.callers.open}

    def _lose_requests(self) -> None:
        """What a thread of an engine does when a step raises: the requests end, and the engine goes on."""
        if self.engine is None:  # it did not even start
            self.process.kill("a step has failed")
            self._die()
            return
        self.engine.abort([(request_id, None) for request_id in self.callers.open])
        for request_id in list(self.callers.open):
            self.callers.abort(request_id, None)
        self.replays.clear()

    def _check_left(self) -> None:
        if self.info.cache_dir is not None and self.info.enable_prefix_caching:
            self.world.count(
                "pages in catalogues", check_catalogue(self.folder, self.disk, self.model, self.catalogues.is_true)
            )


def errors_of(faults: Faults) -> set[str]:
    """What a request may end with in a world with these faults."""
    errors = set()
    if faults.damage or faults.disk or faults.kills:
        errors.add("StoreError")
    if faults.disk:
        errors.add("CapacityError")
    if faults.steps:
        errors.add("DistKVError")
    return errors
