"""Runs plans on the ranks of a group and samples from their logits, in the process of rank 0."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from distkv.workers.disk_shares import disk_shares, join_checksums
from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.group.executor import StepResult
from distkv.workers.group.report import Report, ReportCollector
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.rank import Rank
from distkv.workers.sampling.prompt_scores import PromptScores
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

    def __init__(
        self,
        forward: Forward,
        warm_up: Callable[[], None] = lambda: None,
        take_scores: Callable[[], PromptScores | None] = lambda: None,
        progress: Callable[[], int] = lambda: 0,
        draft: Callable[[list[DraftRequest]], list[list[int]]] = lambda requests: [[] for _ in requests],
    ):
        """
        Args:
            take_scores: see `Rank.take_scores`.
            progress: a number that rises while a plan runs; any thread may ask for it.
            draft: see `Executor.draft`.
        """
        self.warm_up, self.draft = warm_up, draft
        self.forward = forward
        self.progress = progress
        self._take_scores = take_scores
        self._sampled: SampledTokens | None = None  # by the last run with rows

    @classmethod
    def on(cls, rank: Rank, followers: Followers | None = None) -> "RankExecutor":
        """The executor of a group whose rank 0 is `rank`."""
        shares = disk_shares(rank.config)
        reports = ReportCollector(len(shares), partial(join_checksums, shares))

        def forward(plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
            if followers is not None:
                followers.send(plan)
            logits = rank.execute(plan, sampled)
            reported = [rank.take_report()]
            if followers is not None:
                reported += followers.receive()
            return logits, reports.add(reported)

        return cls(forward, rank.warm_up, rank.take_scores, lambda: rank.peers.progress, rank.draft)

    def run(self, plan: StepPlan, rows: list[SampleRow]) -> StepResult:
        """See `Executor.run`."""
        report = None
        try:
            before = self._sampled if plan.num_sampled else None
            tokens = None if before is None else before.tokens
            logits, report = self.forward(plan, tokens)
            scores = self._take_scores()
            if not rows:
                return StepResult(report, scores=scores)
            assert logits is not None
            _resolve_grammars(rows, before)
            self._sampled = sample(logits, rows, tokens)
            return StepResult(report, _OneEach(self._sampled), scores)
        except Exception as error:
            return StepResult(report, error=error)


def _resolve_grammars(rows: list[SampleRow], before: SampledTokens | None) -> None:
    """Has the rows with a grammar know what it allows. That takes the tokens which the step before sampled: they are
    waited for, while the device is at what it has been given of this step."""
    guided = [row for row in rows if row.edits is not None and row.edits.grammar is not None]
    known = before.result() if before is not None and any(row.pending is not None for row in guided) else []
    for row in guided:
        assert row.edits is not None
        row.edits.resolve_grammar(None if row.pending is None else known[row.pending][0])


@dataclass(frozen=True)
class _OneEach:
    """`PendingTokens` of which each row has one."""

    sampled: SampledTokens

    def result(self) -> list[list[SampledToken]]:
        return [[token] for token in self.sampled.result()]
