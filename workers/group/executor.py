"""What runs the steps of an engine, as the engine sees it. Without a tensor."""

from dataclasses import dataclass
from typing import Protocol

from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import SampledToken, TokenLogprobs


class PendingTokens(Protocol):
    """The tokens that a step has sampled, on their way to the host."""

    def result(self) -> list[list[SampledToken]]:
        """Waits for the tokens that each row's answer goes on with, in the order of the rows; may be called again.
        Raises what the device failed with."""


class PendingScores(Protocol):
    """Log-probabilities of tokens of prompts, on their way to the host."""

    def result(self) -> list[TokenLogprobs]:
        """Waits for those of all `SequencePlan.scored`, in the order of the plan; as `PendingTokens.result`."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What came of a plan, as far as the host knows without waiting for the device. With an `error` nothing is
    sampled."""

    report: Report | None  # None when the ranks did not come so far
    sampled: PendingTokens | None = None  # None when there were no rows
    scores: PendingScores | None = None  # None when the plan has no tokens to be scored
    error: Exception | None = None


class Executor(Protocol):
    """All ranks of an engine, by way of rank 0. All methods are called by one thread, the one of the steps."""

    def warm_up(self) -> None:
        """Does what would delay the first steps, before any of them."""

    def draft(self, requests: list[DraftRequest]) -> list[list[int]]:
        """See `DraftModel.draft`, where there is one."""
        ...

    def run(self, plan: StepPlan, rows: list[SampleRow]) -> StepResult:
        """Has the ranks run a plan and samples a token for each row from its logits. Returns when all is launched; a
        GPU may not have begun with it.

        The plan and the rows may refer to tokens that the last run with rows sampled; runs without rows may come
        between.
        """
        ...
