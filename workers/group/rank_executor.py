"""Runs plans on the ranks of a group and samples from their logits, in the process of rank 0."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distkv.workers.group.executor import StepResult
from distkv.workers.group.report import Report, ReportCollector
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.rank import Rank
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import SampledToken
from distkv.workers.sampling.sampler import SampledTokens, sample

Forward = Callable[[StepPlan, Tensor | None], tuple[Tensor | None, Report]]
"""Runs a plan on all ranks, given what the step before sampled (int64 on rank 0's device) where the plan refers to it;
returns the logits that `Rank.execute` returns on rank 0, and the report of all ranks."""


class Followers(Protocol):
    """The ranks behind rank 0, see `LeaderChannel`."""

    def send(self, plan: StepPlan) -> None: ...

    def receive(self) -> list[Report]: ...


class RankExecutor:
    """An `Executor`. What a step has sampled stays on the device, where the next step finds it."""

    def __init__(self, forward: Forward, warm_up: Callable[[], None] = lambda: None):
        self.warm_up = warm_up
        self.forward = forward
        self._sampled: Tensor | None = None  # by the last run with rows, int64

    @classmethod
    def on(cls, rank: Rank, followers: Followers | None = None) -> "RankExecutor":
        """The executor of a group whose rank 0 is `rank`."""
        reports = ReportCollector(rank.group.size)

        def forward(plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
            if followers is not None:
                followers.send(plan)
            logits = rank.execute(plan, sampled)
            reported = [rank.take_report()]
            if followers is not None:
                reported += followers.receive()
            return logits, reports.add(reported)

        return cls(forward, rank.warm_up)

    def run(self, plan: StepPlan, rows: list[SampleRow]) -> StepResult:
        """See `Executor.run`."""
        report = None
        try:
            before = self._sampled if plan.num_sampled else None
            logits, report = self.forward(plan, before)
            if not rows:
                return StepResult(report)
            assert logits is not None
            sampled = sample(logits, rows, before)
            self._sampled = sampled.tokens
            return StepResult(report, _OneEach(sampled))
        except Exception as error:
            return StepResult(report, error=error)


@dataclass(frozen=True)
class _OneEach:
    """`PendingTokens` of which each row has one."""

    sampled: SampledTokens

    def result(self) -> list[list[SampledToken]]:
        return [[token] for token in self.sampled.result()]
