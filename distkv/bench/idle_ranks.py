"""Ranks that do nothing, for whoever measures the leader alone."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distkv.engine.protocol import EngineInfo
from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.group.executor import StepResult
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan, encode
from distkv.workers.sampling.sample_row import SampleRow


class IdleRanks:
    """An `Executor` without ranks: it answers at once, from ready-made logits."""

    def __init__(self, info: EngineInfo):
        self._logits = torch.zeros(info.max_num_seqs, info.vocab_size)
        self._executor = RankExecutor(self._forward)
        self.plan_bytes = 0  # of the last plan
        self.begin()

    def begin(self) -> None:
        """A step begins, in which several plans may be run."""
        self.run_seconds = self.encode_seconds = 0.0

    def warm_up(self) -> None:
        """There is nothing to do."""

    def run(self, plan: StepPlan, rows: list[SampleRow]) -> StepResult:
        """See `Executor.run`; takes down how long that takes, and encoding the plan for followers."""
        start = time.perf_counter()
        result = self._executor.run(plan, rows)
        self.run_seconds += time.perf_counter() - start
        return result

    def draft(self, requests: list[DraftRequest]) -> list[list[int]]:
        """See `Executor.draft`; there is no draft model."""
        return [[] for _ in requests]

    def _forward(self, plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
        start = time.perf_counter()
        self.plan_bytes = len(encode(plan))
        self.encode_seconds += time.perf_counter() - start
        wanted = sum(one.num_logits for one in plan.sequences)
        report = Report(done=[transfer.id for transfer in plan.transfers])
        return (self._logits[:wanted] if plan.sequences else None), report


class LazyThread(Executor):
    """Runs a call when its result is awaited: a real step ends long after the next one is prepared, and meanwhile the
    ranks keep the processor busy, not the interpreter."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """See `concurrent.futures.Executor.submit`."""
        return _Awaited(partial(function, *arguments, **named))


class _Awaited(Future):
    """Has its result made by whoever asks for it first."""

    def __init__(self, make: Callable[[], Any]):
        super().__init__()
        self._make = make

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result(self._make())
        return super().result(timeout)
