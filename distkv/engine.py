"""The engine loop: schedules a step, has the ranks run it, draws tokens, ends what is done."""

from collections.abc import Callable, Iterable

from torch import Tensor

from distkv.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput
from distkv.scheduler import Scheduler
from distkv.sequence import Sequence
from distkv.workers.sampler import SampleRow, TokenLogprobs, sample, uniform_draw
from distkv.workers.step_plan import SequencePlan, StepPlan


class Engine:
    """Works on tokens alone. `execute` runs a step plan on all ranks and returns what rank 0's `Rank.execute` does."""

    def __init__(self, info: EngineInfo, execute: Callable[[StepPlan], Tensor | None]):
        self.info = info
        self._execute = execute
        self._scheduler = Scheduler(info)
        # what the next plan has to do to pages before its sequences run
        self._copies: list[tuple[int, int]] = []
        self._clear: list[int] = []
        self._peak_pages = 0

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests; raises CapacityError, and queues none, when one of them could never run."""
        for request in requests:
            self._scheduler.check(request)
        for request in requests:
            self._scheduler.add(request)

    def abort(self, answers: Iterable[tuple[str, int | None]]) -> None:
        """Ends answers `(request id, index)` at once, with index None all of a request; ended ones are passed over."""
        for request_id, index in answers:
            self._scheduler.abort(request_id, index)

    def close(self) -> None:
        """Nothing to do: memory goes with the object."""

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    def stats(self) -> EngineStats:
        """The state between two steps."""
        return EngineStats(
            pages_in_use=self._scheduler.allocator.num_used,
            peak_pages_in_use=self._peak_pages,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
        )

    def integrity_check(self) -> None:
        """Raises AssertionError when pages were lost or are held twice; meant for when nothing runs."""
        allocator = self._scheduler.allocator
        allocator.integrity_check()
        if not self.has_work:
            assert allocator.num_used == 0

    def step(self) -> list[TokenOutput]:
        """Runs one step and returns the tokens it drew; none while prompts are being read."""
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return []
        plan = self._plan(scheduled)
        self._peak_pages = max(self._peak_pages, self._scheduler.allocator.num_used)
        try:
            logits = self._execute(plan)
            ready = [sequence for sequence, _ in scheduled if not sequence.num_pending]
            assert logits is not None
            drawn = sample(logits, [row for number, one in enumerate(ready) for row in _sample_rows(one, number)])
        except BaseException:
            self._rewind(scheduled, plan)
            raise
        answers = [answer for sequence in ready for answer in self._answers(sequence)]
        return [self._extend(answer, token, logprobs) for answer, (token, logprobs) in zip(answers, drawn, strict=True)]

    def _plan(self, scheduled: list[tuple[Sequence, int]]) -> StepPlan:
        """Takes the pages that the step's tokens need and writes the step down for the ranks."""
        parts = []
        for sequence, count in scheduled:
            start = sequence.table.num_tokens
            self._clear += sequence.table.append(count)
            tokens = sequence.token_ids[start : start + count]
            num_logits = 0 if sequence.num_pending else 1
            parts.append(SequencePlan(tokens, start, sequence.table.slots, sequence.prompt_len, num_logits))
        plan = StepPlan(parts, self._copies, self._clear)
        self._copies, self._clear = [], []
        return plan

    def _rewind(self, scheduled: list[tuple[Sequence, int]], plan: StepPlan) -> None:
        """Undoes a step that failed, so that those of its requests that are not aborted can take it again."""
        for sequence, count in scheduled:
            sequence.table.num_tokens -= count
        self._copies, self._clear = plan.copies, plan.clear

    def _answers(self, sequence: Sequence) -> list[Sequence]:
        """The answers that take a token now: all of the request's when its prompt has just been read."""
        if not sequence.in_prompt:
            return [sequence]
        answers = [sequence]
        for fork, copy in self._scheduler.fork(sequence):
            answers.append(fork)
            if copy is not None:
                self._copies.append(copy)
        return answers

    def _extend(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """Adds a drawn token to its answer and ends the answer if it is to end here."""
        sequence.token_ids.append(token)
        request = sequence.request
        finish_reason = stop_reason = None
        if not request.params.ignore_eos and token in self.info.eos_token_ids:
            finish_reason = "stop"
        elif token in (request.params.stop_token_ids or ()):
            finish_reason, stop_reason = "stop", token
        elif sequence.num_output_tokens >= request.max_tokens:
            finish_reason = "length"
        if finish_reason:
            self._scheduler.finish(sequence)
        return TokenOutput(request.request_id, sequence.index, token, logprobs, finish_reason, stop_reason)


def _sample_rows(sequence: Sequence, logits_row: int) -> list[SampleRow]:
    """The draws from one row of logits, one for each of `Engine._answers`."""
    params = sequence.request.params
    position = sequence.num_output_tokens
    return [
        SampleRow(
            logits_row=logits_row,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            num_logprobs=params.logprobs,
            uniform=uniform_draw(sequence.request.seed, index, position) if params.temperature > 0 else 0.0,
            prompt_token_ids=sequence.request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
        )
        for index in (range(params.n) if sequence.in_prompt else [sequence.index])
    ]
