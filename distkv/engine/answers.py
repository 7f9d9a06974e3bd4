"""What steps sample becomes answers, which end where they are to end; and what is to be told of them."""

import logging

from distkv.engine.fork_copies import ForkCopies
from distkv.engine.no_token import no_token
from distkv.engine.protocol import EngineInfo, EngineRequest, PromptLogprobs, RequestFailed, StepOutput, TokenOutput
from distkv.engine.scheduler import Scheduler
from distkv.engine.sequence import Sequence
from distkv.engine.step_runner import StepRunner
from distkv.errors import DistKVError
from distkv.workers.sampling.sampled_token import NO_TOKEN, SampledToken, TokenLogprobs

log = logging.getLogger(__name__)


class Answers:
    """Those of all requests of an engine."""

    def __init__(self, info: EngineInfo, scheduler: Scheduler, copies: ForkCopies, runner: StepRunner):
        self.outputs: list[StepOutput] = []  # that nobody has taken
        self._info, self._scheduler, self._copies, self._runner = info, scheduler, copies, runner

    def take(self) -> list[StepOutput]:
        """What has come since the last time."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def score(self, sequence: Sequence, scored: list[TokenLogprobs]) -> None:
        """Takes in log-probabilities of the next tokens of a prompt."""
        self.outputs.append(PromptLogprobs(sequence.request.request_id, 1 + sequence.num_scored, scored))
        sequence.num_scored += len(scored)

    def extend(self, sequence: Sequence, tokens: list[list[SampledToken]]) -> None:
        """Adds tokens to the answers that a sequence stands for, some to each."""
        answers = [sequence]
        if not sequence.num_output_tokens:
            self._scheduler.meter.began(sequence)
        if not sequence.is_alone:
            for fork, copy in self._scheduler.fork(sequence):
                answers.append(fork)
                if copy is not None:
                    self._copies.add(copy)
        for answer, new in zip(answers, tokens, strict=True):
            if answer.index in sequence.dropped and not answer.finished:
                self._finish(answer, "abort")
            for place, (token_id, logprobs) in enumerate(new):
                if token_id == NO_TOKEN and not answer.finished:
                    self.fail(answer.request, no_token(self._info.model, answer.request, answer.rules))
                elif not answer.finished:
                    self._scheduler.meter.sampled(answer)
                    answer.token_ids.append(token_id)
                    if place:
                        answer.commit(1)  # the token before it, which was drafted
                    self.outputs.append(self._output(answer, logprobs))

    def refuse(self, request: EngineRequest, error: DistKVError) -> None:
        """Tells of a request that was not queued."""
        self._scheduler.meter.refused(request)
        self._tell_failure(request, error)

    def fail(self, request: EngineRequest, error: DistKVError) -> None:
        """Ends a request that cannot go on."""
        log.error("request %s failed: %s", request.request_id, error)
        self.abort(request.request_id, None, "error")
        self._tell_failure(request, error)

    def abort(self, request_id: str, index: int | None, reason: str) -> None:
        """See `Scheduler.abort`."""
        self._runner.end_tables(sequence.number for sequence in self._scheduler.abort(request_id, index, reason))

    def _output(self, answer: Sequence, logprobs: TokenLogprobs | None) -> TokenOutput:
        """What is told of the newest token of an answer, which ends if it is to end here."""
        finish_reason, stop_reason = answer.ending(self._info.eos_token_ids)
        if finish_reason:
            self._finish(answer, finish_reason)
        cached = answer.num_cached if answer.num_output_tokens == 1 else (0, 0, 0)
        return TokenOutput(
            answer.request.request_id, answer.index, answer.token_ids[-1], logprobs, finish_reason, stop_reason, cached
        )

    def _finish(self, answer: Sequence, reason: str) -> None:
        self._scheduler.finish(answer, reason)
        self._runner.end_tables([answer.number])

    def _tell_failure(self, request: EngineRequest, error: DistKVError) -> None:
        self.outputs.append(RequestFailed(request.request_id, type(error).__name__, str(error)))
