"""A step on its way through the ranks."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from distkv.engine.fork_copies import PageCopy
from distkv.engine.sequence import Chosen, Sequence
from distkv.storage.ledger.page import Page
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import SequencePlan, StepPlan
from distkv.workers.sampling.sample_row import SampleRow, uniform_number
from distkv.workers.sampling.sampler import SampledTokens


@dataclass(frozen=True)
class Landing:
    """What came of a plan, as far as the host knows without waiting for the device; with an `error`, nothing is
    drawn."""

    report: Report | None  # None when the ranks did not come so far
    draws: SampledTokens | None = None  # None when there are none
    error: Exception | None = None


@dataclass(eq=False)
class Flight:
    """A step that is settled, and runs once it is launched."""

    plan: StepPlan
    scheduled: Chosen
    parts: list[tuple[Sequence, SequencePlan]]  # those that the model runs
    # those that the step draws for, in the order of the logits, each with the number of its first draw
    drawing: dict[Sequence, int]
    num_draws: int
    late: dict[Sequence, int]  # those that run a draw of the step before, which is not known yet, with its number
    relocated: list[Page] = field(default_factory=list)  # whose places the plan tells
    copies: list[PageCopy] = field(default_factory=list)  # whose pages are held until the step has landed
    landing: "Future[Landing] | None" = None  # once it is launched
    # once it has landed
    draws: SampledTokens | None = None
    spoilt: set[Sequence] = field(default_factory=set)  # take the step again, since a page could not be read

    @classmethod
    def board(cls, scheduled: Chosen, before: "Flight | None") -> "Flight":
        """Gives the step's tokens their pages and writes down what the sequences run.

        Args:
            before: the step before, unless its draws are booked; those that follow from it are run by their number.
        """
        clear: list[int] = []
        random_pages = []
        parts = []
        drawing: dict[Sequence, int] = {}
        late: dict[Sequence, int] = {}
        num_draws = 0
        for sequence, count in scheduled:
            table = sequence.table
            start = table.num_tokens
            fresh = table.append(count)
            if start < sequence.num_random_in_all:
                random_pages += [(page.location, sequence.page_seed(page)) for page in fresh]
                continue
            clear += [page.location for page in fresh]
            draws = start + count == len(sequence.token_ids) + sequence.num_pending
            if sequence.num_pending:
                assert before is not None
                late[sequence] = before.drawing[sequence]
            if draws:
                drawing[sequence] = num_draws
                num_draws += sequence.num_answers
                sequence.num_pending += 1
            parts.append((sequence, sequence.plan(start, count, int(draws), late.get(sequence))))
        num_sampled = before.num_draws if before is not None and late else 0
        plan = StepPlan([part for _, part in parts], [], clear, random_pages=random_pages, num_sampled=num_sampled)
        return cls(plan, scheduled, parts, drawing, num_draws, late)

    @property
    def forks(self) -> bool:
        """Whether more than one answer of a request begins with this step."""
        return any(not sequence.is_drawn_once for sequence in self.drawing)

    def rows(self) -> list[SampleRow]:
        """What is to be drawn from the step's logits: one token for an answer being written, one for each answer of a
        request whose prompt has just been read. To be called before the draws of the step before are booked."""
        return [
            _sample_row(sequence, index, number, self.late.get(sequence))
            for number, sequence in enumerate(self.drawing)
            for index in ([sequence.index] if sequence.is_drawn_once else range(sequence.request.params.n))
        ]


def _sample_row(sequence: Sequence, index: int, logits_row: int, late: int | None) -> SampleRow:
    params = sequence.request.params
    position = sequence.num_output_tokens + (late is not None)
    row = SampleRow(
        logits_row=logits_row,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        num_logprobs=params.logprobs,
        uniform=uniform_number(sequence.request.seed, index, position) if params.temperature > 0 else 0.0,
        prompt_token_ids=sequence.request.prompt_token_ids,
        output_token_ids=[],
        pending=late,
    )
    if row.penalised:
        row.output_token_ids.extend(sequence.output_token_ids)
    return row
