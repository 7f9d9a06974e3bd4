"""A step on its way through the ranks: what it runs, how it is taken back, what comes of it."""

import time
from concurrent.futures import Future

from distkv.engine.fork_copies import ForkCopies, PageCopy
from distkv.engine.page_places import tell_places
from distkv.engine.sample_rows import sample_rows
from distkv.engine.sequence import Scheduled, Sequence
from distkv.engine.sequence_work import SequenceWork
from distkv.engine.step_runner import StepRunner
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.workers.group.executor import PendingScores, PendingTokens, StepResult
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.sampling.sampled_token import NO_TOKEN, SampledToken, TokenLogprobs


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
        self.relocated = tell_places(plan, self._cache)
        plan.ended = self._runner.take_ended()
        self.copies = self._copies.take()
        plan.copies = [(source.location, target.location) for source, target in self.copies]

    def start(self) -> None:
        """Has the ranks run it. To be called before the tokens of the step before are read."""
        self.started_at = time.perf_counter()
        self._result = self._runner.start(self.plan, sample_rows(self.work))

    def wait(self) -> StepResult:
        """What came of it, as soon as the ranks have reported. A wait that was interrupted may be taken up again."""
        assert self._result is not None
        return self._runner.wait(self._result)

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
