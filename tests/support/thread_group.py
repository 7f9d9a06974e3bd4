"""An engine over several ranks of this process, each in a thread of its own: all but the processes and the network is
as on a cluster."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from distkv import LLM, EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.launch import launch
from distkv.workers.cache_place import CachePlace, free_bytes
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.process_group import ProcessGroup, open_store
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.shared_memory import SharedMemory
from distkv.workers.group.stage_link import StageLink
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank import Loaded, Rank
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes

PATIENCE = 60  # seconds


def join_in_threads(size: int) -> list[ProcessGroup]:
    """A group of ranks that are threads, which exchange through shared memory as those of one machine do."""
    if size == 1:
        return [ProcessGroup()]
    store = open_store("127.0.0.1")

    def join(rank: int) -> ProcessGroup:
        shared = SharedMemory.join(open_store("127.0.0.1", store.port), rank, size)
        return ProcessGroup(rank, size, in_order=True, shared=shared)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(join, range(size)))


class QueueLink(StageLink):
    """A link between threads."""

    def __init__(self, before: "SimpleQueue[Tensor]", after: "SimpleQueue[Tensor]"):
        super().__init__(0, 0, "gloo")
        self._from, self._to = before, after

    def send(self, x: Tensor) -> None:
        if x.numel():
            self._to.put(x.clone())

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        x = torch.empty(shape, dtype=dtype) if 0 in shape else self._from.get(timeout=PATIENCE)
        assert (x.shape, x.dtype) == (shape, dtype)
        self.num_received += 1
        return x


def communicators(layout: Layout) -> list[Communicators]:
    """Of all ranks."""

    def groups(size: int) -> list[ProcessGroup]:
        return [one for _ in range(0, layout.size, size) for one in join_in_threads(size)]

    size = layout.tensor_parallel_size
    stages, contexts = groups(size), groups(layout.decode_context_parallel_size)
    queues: list[SimpleQueue[Tensor]] = [SimpleQueue() for _ in range(layout.size)]  # to each rank
    links = [QueueLink(queues[rank], queues[(rank + size) % layout.size]) for rank in range(layout.size)]
    return [
        Communicators(rank, stages[rank], contexts[rank], links[rank] if size < layout.size else None)
        for rank in range(layout.size)
    ]


class ThreadGroup:
    """A `RankGroup`, whose ranks are threads; also the `Followers` of its rank 0."""

    def __init__(self, device: str) -> None:
        self.device = "cpu" if device == "auto" else device
        self.ranks: list[Rank] = []
        self._threads: list[ThreadPoolExecutor] = []
        self._reports: list[Any] = []

    def on_all(self, run: Callable[[int], Any]) -> list[Any]:
        """Runs on all ranks at a time."""
        return [one.result() for one in [pool.submit(run, rank) for rank, pool in enumerate(self._threads)]]

    def load(self, config: RankConfig) -> list[Loaded]:
        peers = communicators(config.layout)
        self._threads = [ThreadPoolExecutor(1) for _ in peers]
        self.ranks = self.on_all(lambda rank: Rank(config, peers[rank]))
        return [rank.loaded for rank in self.ranks]

    def capacity(self, of_device: bool) -> Capacity:
        found = self.on_all(lambda rank: self.ranks[rank].page_capacity(len(self.ranks), of_device))
        return Capacity(min(one.device for one in found), min(one.host for one in found))

    def free_disk_bytes(self, folder: Path) -> int:
        return free_bytes(folder)

    def allocate(self, sizes: PoolSizes, place: CachePlace | None) -> list[tuple[int, int, int]]:
        return [
            pool.submit(rank.allocate, sizes, place).result()
            for pool, rank in zip(self._threads, self.ranks, strict=True)
        ]

    def bandwidth(self) -> list[Bandwidth]:
        return self.on_all(lambda rank: self.ranks[rank].bandwidth())

    def make_executor(self) -> RankExecutor:
        for pool, rank in list(zip(self._threads, self.ranks, strict=True))[1:]:
            pool.submit(rank.warm_up)
        return RankExecutor.on(self.ranks[0], self)

    def send(self, plan: StepPlan) -> None:
        def follow(rank: Rank) -> Report:
            rank.plan_check.check(plan)
            rank.execute(plan)
            return rank.take_report()

        followers = zip(self._threads[1:], self.ranks[1:], strict=True)
        self._reports = [pool.submit(follow, rank) for pool, rank in followers]

    def receive(self) -> list[Report]:
        return [one.result() for one in self._reports]

    def close(self) -> None:
        for pool, rank in reversed(list(zip(self._threads, self.ranks, strict=True))):
            pool.submit(rank.close).result()
            pool.shutdown()
        self._threads = []


@contextmanager
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ThreadGroup]]:
    """An LLM whose ranks would be on Ray has them in threads of this process meanwhile, and its engine is an `Engine`.
    Yields the groups of those that were made."""
    groups: list[ThreadGroup] = []

    def start(config: EngineConfig, model: ModelConfig, max_model_len: int, *_: Any) -> EngineClient:
        groups.append(group := ThreadGroup(config.device))
        try:
            info = launch.set_up(group, config, model, max_model_len)
            return Engine(info, group.make_executor(), group.close)
        except BaseException:
            group.close()
            raise

    with monkeypatch.context() as patched:
        patched.setattr(launch, "_launch_on_ray", start)
        yield groups


def llm_in_threads(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> tuple[LLM, ThreadGroup]:
    """An LLM whose ranks are threads, however many."""
    with ranks_in_threads(monkeypatch) as groups:
        llm = LLM(folder, num_threads=1, **options)
    return llm, groups[0]
