"""A step on its way through the ranks: what it runs, how it is taken back, what comes of it."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from distkv.engine.fork_copies import ForkCopies, PageCopy
from distkv.engine.sequence import Scheduled, Sequence
from distkv.engine.step_runner import StepRunner
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.executor import PendingScores, PendingTokens, StepResult
from distkv.workers.group.step_plan import SequencePlan, StepPlan
from distkv.workers.sampling.sample_row import SampleRow, uniform_number
from distkv.workers.sampling.sampled_token import NO_TOKEN, SampledToken, TokenLogprobs

WAITING_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class SequenceWork:
    """What a step does for one sequence."""

    sequence: Sequence
    num_tokens: int  # that it runs, with those of a draft, or whose pages it fills with synthetic KV
    plan: SequencePlan | None = None  # None where nothing is run
    sampled_index: int | None = None  # of its first token among those that the step samples; None when it gets none
    pending_index: int | None = None  # of the token that it runs among those of the step before, while it is unknown
    # the last of its tokens, of which nobody knows yet whether they come
    draft: list[int] = field(default_factory=list)
    is_drafting: bool = False  # it is to find the draft's next token, and all that it runs is taken back
    num_right: int | None = None  # tokens of the draft that the answer goes on with, once its tokens are read
    is_damaged: bool = False  # could not read one of its pages, so its tokens are to be run again


class Step:
    """Made, it has given its tokens their pages; `fix_pages` completes its plan. Then it is started and waited for. In
    the end it is committed, and its tokens are read; or it is undone, which is possible at any time before."""

    def __init__(
        self, scheduled: Scheduled, before: "Step | None", cache: TieredCache, copies: ForkCopies, runner: StepRunner
    ):
        """
        Args:
            before: the step before, while its tokens are not read; the plan refers to those by their indexes.
        """
        self._cache, self._copies, self._runner = cache, copies, runner
        self.work: list[SequenceWork] = []
        self.num_sampled = 0  # tokens
        self.forks = False  # whether more than one answer of a request begins with this step
        self.started_at = 0.0  # by `time.perf_counter`
        self.drafted: list[tuple[Sequence, int | None]] = []  # next tokens of drafts, once they are read; None: none
        self.copies: list[PageCopy] = []  # whose pages are held until the step has ended
        self.relocated: list[Page] = []  # whose locations the plan sends
        self._indexes: dict[Sequence, int] = {}  # `SequenceWork.sampled_index`, where there is one
        self._result: Future[StepResult] | None = None  # once it has started
        self._sampled: PendingTokens | None = None  # once it is committed
        self._scores: PendingScores | None = None
        self._is_open = True  # neither committed nor undone
        self.plan = StepPlan([], [], [])
        for sequence, count in scheduled:
            self.work.append(self._work(sequence, count, before))
        if any(work.pending_index is not None for work in self.work):
            assert before is not None
            self.plan.num_sampled = before.num_sampled

    @property
    def sequences(self) -> list[Sequence]:
        """All that take part, in order."""
        return [work.sequence for work in self.work]

    @property
    def num_drafts(self) -> int:
        """Sequences whose drafts it checks."""
        return sum(bool(work.draft) for work in self.work if not work.is_drafting)

    @property
    def num_drafted(self) -> int:
        """Tokens of all drafts, those that it checks or goes on behind."""
        return sum(len(work.draft) for work in self.work)

    @property
    def is_drafting(self) -> bool:
        """Whether it finds tokens of drafts."""
        return any(work.is_drafting for work in self.work)

    @property
    def only_decodes(self) -> bool:
        """Whether each sequence runs its newest token, and a draft or not, and none reads its prompt."""
        return all(work.num_tokens == 1 + len(work.draft) for work in self.work)

    @property
    def beginning(self) -> set[Sequence]:
        """Those whose first step it is, so that the ranks know none of their pages."""
        return {work.sequence for work in self.work if work.plan is not None and not work.plan.first_page}

    def fix_pages(self) -> None:
        """Completes the plan by what ranks must know of pages and tables; nothing of that changes before it starts."""
        plan = self.plan
        plan.transfers, plan.await_ids = self._cache.take_transfers()
        self.relocated = self._cache.take_relocated()
        plan.relocated = [(page.id, page.location) for page in self.relocated]
        plan.new_pages = [page.id for page in self._cache.take_new(self.relocated)]
        plan.ended = self._runner.take_ended()
        self.copies = self._copies.take()
        plan.copies = [(source.location, target.location) for source, target in self.copies]

    def start(self) -> None:
        """Has the ranks run it. To be called before the tokens of the step before are read."""
        self.started_at = time.perf_counter()
        self._result = self._runner.start(self.plan, self._rows())

    def wait(self, waiting: Callable[[], None] = lambda: None) -> StepResult:
        """What came of it, as soon as the ranks have reported. A wait that was interrupted may be taken up again.

        Args:
            waiting: called every now and then meanwhile.
        """
        assert self._result is not None
        while not self._result.done():
            try:
                return self._result.result(WAITING_SECONDS)
            except TimeoutError:
                waiting()
        return self._result.result()

    def commit(self, result: StepResult, damaged: set[Page]) -> None:
        """Books what it has run, but for the tokens that it sampled and for drafts. Pages that it fills get their keys:
        the tokens in them are known, since those of the step before are read.

        Args:
            damaged: pages that could not be read. Sequences that hold one have run in vain.
        """
        self._is_open = False
        self._sampled, self._scores = result.sampled, result.scores
        self._copies.release(self.copies)
        for work in self.work:
            sequence = work.sequence
            if sequence.finished:
                continue
            if damaged and not damaged.isdisjoint(sequence.table.pages):
                work.is_damaged = True
            if work.is_drafting:
                sequence.reject(work.num_tokens)
            elif work.is_damaged:
                sequence.rewind(work.num_tokens, has_run=True)
            else:
                sequence.commit(work.num_tokens - len(work.draft))

    def read(self) -> list[tuple[Sequence, list[list[SampledToken]]]]:
        """Waits for the tokens that it sampled. Returns the sequences that go on by them, each with the tokens of every
        answer that it stands for. Of a draft those are tokens of the answer that it goes on with by itself; all others
        are taken back. They are still to be committed then, one by one as they are added. Raises what the device failed
        with; to be called again after an interruption."""
        tokens = [] if self._sampled is None else self._sampled.result()
        found = []
        for work in self.work:
            sequence, first = work.sequence, work.sampled_index
            if work.is_drafting:
                assert first is not None
                token_id, _ = tokens[first][0]
                self.drafted.append((sequence, None if token_id == NO_TOKEN else token_id))
            elif first is not None:
                sequence.num_pending -= 1
                if not sequence.finished and not work.is_damaged:
                    own = tokens[first : first + sequence.num_answers + len(work.draft)]
                    found.append((sequence, self._checked(work, own) if work.draft else own))
        return found

    def _checked(self, work: SequenceWork, rows: list[list[SampledToken]]) -> list[list[SampledToken]]:
        """The tokens that an answer goes on with, given what was sampled behind each token of its draft and before."""
        num_right = 0
        for drafted, row in zip(work.draft, rows, strict=False):
            if row[0][0] != drafted:
                break
            num_right += 1
        work.sequence.reject(len(work.draft) - num_right)
        work.num_right = num_right
        return [[token for row in rows[: num_right + 1] for token in row]]

    def read_scores(self) -> list[tuple[Sequence, list[TokenLogprobs]]]:
        """Waits for the log-probabilities of prompts. Returns those of each sequence's next tokens, see
        `Sequence.num_scored`; raises as `read` does."""
        if self._scores is None:
            return []
        scores = iter(self._scores.result())
        found = []
        for work in self.work:
            own = [] if work.plan is None else [next(scores) for _ in work.plan.scored]
            if own and not work.sequence.finished and not work.is_damaged:
                found.append((work.sequence, own))
        return found

    def undo(self, reported: bool = False) -> None:
        """Takes back all that was prepared, unless it has ended already; steps behind it must have been undone.

        Args:
            reported: the ranks have reported on the plan's transfers, so only what sequences have run is taken back.
        """
        if not self._is_open:
            return
        self._is_open = False
        for work in self.work:
            if work.sequence.finished:
                continue
            if work.is_drafting:
                work.sequence.reject(work.num_tokens)
            else:
                work.sequence.rewind(work.num_tokens, has_run=self._result is not None)
        for work in self.work:
            if work.plan is not None:
                work.sequence.num_sent = min(work.sequence.num_sent, work.plan.first_page)
            if work.sampled_index is not None and not work.is_drafting:
                work.sequence.num_pending -= 1
        self._copies.put_back(self.copies)
        if not reported:
            self._cache.put_back(self.plan.transfers, self.plan.await_ids, self.relocated)
            self._runner.put_back_ended(self.plan.ended)

    def _work(self, sequence: Sequence, count: int, before: "Step | None") -> SequenceWork:
        """Gives a sequence the pages of its next tokens and adds its part to the plan."""
        work = SequenceWork(sequence, count)
        start = sequence.table.num_tokens
        taken = sequence.table.append(count)
        if sequence.synthetic.covers(start):
            self.plan.synthetic_pages += sequence.synthetic.fills(taken)
            return work
        self.plan.clear += [page.location for page in taken]
        work.draft, work.is_drafting = sequence.draft, sequence.is_drafting
        sequence.draft, sequence.is_drafting = [], False
        is_last = start + count == len(sequence.token_ids) + sequence.num_pending + len(work.draft)
        if sequence.num_pending:
            assert before is not None
            work.pending_index = before._indexes[sequence]
        num_logits = 0
        if work.is_drafting:
            assert is_last and sequence.is_alone and not sequence.num_pending
            work.sampled_index, num_logits = self.num_sampled, 1
            self.num_sampled += 1
        elif is_last:
            work.sampled_index, num_logits = self.num_sampled, 1 + len(work.draft)
            self._indexes[sequence] = self.num_sampled
            self.num_sampled += sequence.num_answers + len(work.draft)
            self.forks |= not sequence.is_alone
            sequence.num_pending += 1
        work.plan = sequence.plan(start, count, num_logits, work.pending_index, work.draft)
        work.plan.resident_only = work.is_drafting
        if sequence.num_top is not None:
            sequence.add_scored(work.plan)
        self.plan.sequences.append(work.plan)
        return work

    def _rows(self) -> list[SampleRow]:
        """What is to be sampled from the step's logits: one token for an answer being written and one behind each token
        of its draft, one for each answer of a request whose prompt has just been read. What would come next in a draft
        is sampled as it will be once the draft is checked."""
        rows: list[SampleRow] = []
        logits_row = 0
        for work in self.work:
            if work.sampled_index is None:
                continue
            one = work.sequence
            if work.is_drafting:
                rows.append(_sample_row(one, one.index, logits_row, None, work.draft))
                rows[-1].num_logprobs = None
                logits_row += 1
                continue
            for index in [one.index] if one.is_alone else range(one.request.params.n):
                rows.append(_sample_row(one, index, logits_row, work.pending_index, []))
            for count in range(1, len(work.draft) + 1):
                rows.append(_sample_row(one, one.index, logits_row + count, None, work.draft[:count]))
            logits_row += 1 + len(work.draft)
        return rows


def _sample_row(
    sequence: Sequence, index: int, logits_row: int, pending_index: int | None, draft: list[int]
) -> SampleRow:
    """How the token behind those of a draft is sampled, or behind the answer's own where there is none."""
    params = sequence.request.params
    position = sequence.num_output_tokens + (pending_index is not None) + len(draft)
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
        pending=pending_index,
    )
    if row.penalised:
        row.output_token_ids.extend(sequence.output_token_ids + draft)
    if sequence.rules is not None:
        row.edits = sequence.rules.edits(sequence.output_token_ids, pending_index is not None, draft)
    return row
