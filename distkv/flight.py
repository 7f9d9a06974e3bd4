"""A step on its way through the ranks."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from distkv.sequence import Chosen, Sequence
from distkv.storage.page import Page
from distkv.workers.report import Report
from distkv.workers.sampler import SampleRow, TokenLogprobs, uniform_draw
from distkv.workers.step_plan import SequencePlan, StepPlan

Draw = tuple[int, TokenLogprobs | None]


@dataclass(frozen=True)
class Landing:
    """What came of a plan; with an `error`, nothing was drawn."""

    report: Report | None  # None when the ranks did not come so far
    drawn: list[Draw] = field(default_factory=list)
    error: Exception | None = None


@dataclass(eq=False)
class Flight:
    """A step that is settled, and runs once it is launched."""

    plan: StepPlan
    scheduled: Chosen
    parts: list[tuple[Sequence, SequencePlan]]  # those that the model runs
    moved: list[Page]  # whose places the plan tells
    drawing: list[Sequence]  # those that the step draws for, in the order of the logits
    copies: list[tuple[Page, Page]]  # (source, target), held until the step has ended
    landing: "Future[Landing] | None" = None

    @property
    def forks(self) -> bool:
        """Whether more than one answer of a request begins with this step."""
        return any(not sequence.is_drawn_once for sequence in self.drawing)

    def fill_in(self) -> None:
        """Puts in the tokens that were not drawn yet when the step was settled."""
        for sequence, part in self.parts:
            if not part.token_ids:
                part.token_ids.append(sequence.token_ids[part.start])

    def rows(self) -> list[SampleRow]:
        """What is to be drawn from the step's logits: one token for an answer being written, one for each answer of a
        request whose prompt has just been read."""
        return [
            _sample_row(sequence, index, number)
            for number, sequence in enumerate(self.drawing)
            for index in ([sequence.index] if sequence.is_drawn_once else range(sequence.request.params.n))
        ]


def _sample_row(sequence: Sequence, index: int, logits_row: int) -> SampleRow:
    params = sequence.request.params
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
        uniform=(
            uniform_draw(sequence.request.seed, index, sequence.num_output_tokens) if params.temperature > 0 else 0.0
        ),
        prompt_token_ids=sequence.request.prompt_token_ids,
        output_token_ids=[],
    )
    if row.penalised:
        row.output_token_ids.extend(sequence.output_token_ids)
    return row
