"""What happens in a run: callers send requests, and this and that goes wrong, until the ranks have run enough plans."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from simulation.answers import Callers
from simulation.catalogues import patches
from simulation.drafts import SimulatedDrafts
from simulation.executor import SimulatedExecutor
from simulation.model import PlainModel
from simulation.node import Node
from simulation.shape import Faults, any_faults, any_info, make_ranks, with_drafts, without_tiers
from simulation.workload import Workload
from simulation.world import Hung, Process, World

from distkv.engine import answer_lengths, step
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.engine.speculation import methods, self_speculator, speculator
from distkv.errors import CapacityError

SECONDS = 20000.0  # in which something must come of what is to be done
MOST_OPEN = 12  # requests at a time


class Driver:
    """A run over engines of some kind."""

    patience = 3000  # turns in which something must come of what is to be done

    def __init__(self, world: World):
        self.world = world
        rng = world.rng
        self._cleanup = ExitStack()
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(dir=Path("/dev/shm"))))
        self.info = any_info(rng, str(folder))
        if world.seed % 3 == 0:
            self.info = with_drafts(self.info, Random(world.seed))
        self.is_short = world.seed % 9 == 7  # of pages
        if self.is_short:
            self.info = without_tiers(self.info)
        self.num_heads = rng.choice([1, 1, 2, 3])
        self.model = PlainModel(self.num_heads, self.info.page_size, self.info.num_observed)
        self.faults = self.given = any_faults(rng)
        self.nodes = [Node(world, folder)]
        self.workload = Workload(rng, self.info, self.is_short)
        self.callers = Callers(world, self.info, self.model, self.explained(self.faults))
        self.pace = rng.choice([0.002, 0.02, 1.5])  # seconds that a step takes at most
        self.client: EngineClient | None = None
        self._be_patient()

    def run(self, num_plans: int) -> None:
        """Goes on until the ranks have run so many plans, and to the end of what was begun then."""
        with self._cleanup:
            for module, name, replacement in [*patches(self.world, self.nodes), *self.patches(), *self._drafts()]:
                self._cleanup.enter_context(patch.object(module, name, replacement))
            while self.world.counts["plans"] < num_plans:
                self._turn(accepts=True)
            self.faults = Faults()
            self.heal()
            while self.client is None or self.client.has_work:
                self._turn(accepts=False)
            assert not self.callers.open, "nothing is to be done, and not all are answered"
            self._check_idle()
            self.close()

    def make_executor(self, process: Process, node: Node) -> SimulatedExecutor:
        """What a group of some number of ranks runs, over what lies on a node."""
        num_ranks = self.world.rng.choice([1, 1, 2, 3])  # files are by head, so another number finds them too
        node.restart(process, self.info.enable_prefix_caching, self.faults.broken_catalogue)
        ranks = make_ranks(self.world, process, self.info, node.disk, self.num_heads, num_ranks)
        return SimulatedExecutor(self.world, process, self.info, ranks)

    def _drafts(self) -> list[tuple[Any, str, Any]]:
        drafts = SimulatedDrafts(self.world, self.model, self.info)
        return [
            (methods, "NgramDrafts", lambda _: drafts), (speculator, "time", self.world.time),
            (step, "time", self.world.time), (self_speculator, "TRIAL_SHARE", 0.5),
            *([(answer_lengths, "FIRST_GUESS", 1)] if self.is_short else []),
        ]  # fmt: skip

    # --- what a kind of engines is asked for ---

    def explained(self, faults: Faults) -> set[str]:
        """Names of errors that a request may end with where these faults happen."""
        errors = set()
        if faults.damage or faults.disk:
            errors.add("StoreError")
        if faults.disk:
            errors.add("CapacityError")
        return errors

    def patches(self) -> list[tuple[Any, str, Any]]:
        """More of what is to be replaced, see `catalogues.patches`."""
        return []

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        for node in self.nodes:
            node.heal()

    def engines(self) -> list[Engine]:
        """Those that run."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the client."""
        raise NotImplementedError

    def _turn(self, accepts: bool) -> None:
        raise NotImplementedError

    # --- turns ---

    def befall(self) -> None:
        """What goes wrong with disks now."""
        world, faults, node = self.world, self.faults, self.world.rng.choice(self.nodes)
        if world.chance(faults.damage):
            node.disk.damage()
        if world.chance(faults.disk):
            node.disk.change()
        if world.chance(faults.catalogue):
            node.is_locked = not node.is_locked

    def callers_act(self) -> None:
        """What callers do now."""
        assert self.client is not None
        world, rng = self.world, self.world.rng
        if world.chance(self.workload.busy) and len(self.callers.open) < MOST_OPEN:
            self.send()
        if self.callers.open and world.chance(0.02):
            self._abort(rng.choice(list(self.callers.open)), "aborted")
        waiting = [one for engine in self.engines() for one in engine._scheduler.waiting]
        preempted = {one.request.request_id for one in waiting if one.was_preempted} & self.callers.open.keys()
        if preempted and world.chance(0.3):
            self._abort(min(preempted), "aborted without its pages")
        if world.chance(0.002):
            self.client.reset_prefix_cache()
        if world.chance(0.005):
            self.client.stats()

    def _abort(self, request_id: str, name: str) -> None:
        """Somebody does not want an answer any more, or all of a request's."""
        assert self.client is not None
        index = self.world.rng.choice([None, *range(self.callers.open[request_id].request.params.n)])
        self.client.abort([(request_id, index)])
        self.callers.abort(request_id, index)
        self.world.count(name)

    def send(self) -> None:
        """Some requests come."""
        assert self.client is not None
        requests = [self.workload.request() for _ in range(self.world.rng.choice([1, 1, 1, 3]))]
        try:
            self.client.add(requests)
        except CapacityError:
            self.world.count("refused")
            self.callers.refused |= {request.request_id for request in requests}
            return
        for request in requests:
            self.callers.sent(request)

    def step(self, accepts: bool) -> None:
        """A step, where there is something to do."""
        assert self.client is not None
        if not self.client.has_work:
            self._rest()
            if accepts and self.client is not None:
                self.send()
            return
        outputs = self.client.step()
        for caller in self.callers.take(outputs):
            self.workload.said(caller.request, caller.answers[0].tokens)
        if outputs:
            self._be_patient()
        self._turns_left -= 1
        if self._turns_left < 0:
            raise Hung(f"nothing has come for {self.patience} turns")

    def _be_patient(self) -> None:
        """Something has come."""
        self._turns_left = self.patience
        self.world.end = self.world.now + SECONDS

    def _rest(self) -> None:
        """Nothing is to be done."""
        assert self.client is not None
        self._be_patient()
        assert not self.callers.open, "nothing is to be done, and not all are answered"
        self.client.rest()
        if self.world.chance(0.3):
            self._check_idle()
        if self.world.chance(0.03):
            self.close()
        else:
            self.world.sleep(self.world.rng.random())

    def _check_idle(self) -> None:
        for engine in self.engines():
            executor: Any = engine._runner.executor
            if not engine.has_work and not executor.is_running:  # else it writes to a disk that takes pages again
                self.world.count("idle checks")
                engine.integrity_check()
                stats = engine.stats()
                assert stats.num_running == stats.num_waiting == stats.pages_in_use == 0
                directories = [rank.directory for rank in executor.ranks]
                assert not any(one._tables or one._memories for one in directories), "ranks keep what nobody needs"

    def check_left(self) -> None:
        """What a process has left on disk is true, however it ended."""
        for node in self.nodes:
            if self.info.cache_dir is not None and self.info.enable_prefix_caching:
                self.world.count("pages in catalogues", node.check(self.model))
        if all(node.is_true and not node.disk.num_damages for node in self.nodes):
            assert not self.world.counts["wrong checksum"], "nobody has damaged a file"
