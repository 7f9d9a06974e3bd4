"""What callers get, compared with a plain model that keeps nothing, token by token."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from simulation.model import PlainModel, score
from simulation.world import World

from distkv.engine.protocol import EngineInfo, EngineRequest, PromptLogprobs, RequestFailed, StepOutput, TokenOutput
from distkv.engine.scheduler import Scheduler
from distkv.errors import CapacityError


@dataclass
class Answer:
    """One answer of a request as its caller has it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    ended: str = ""  # how


@dataclass
class Caller:
    """Who has sent a request."""

    request: EngineRequest
    answers: list[Answer]
    scores: list[float] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return any(not answer.ended for answer in self.answers)


class Callers:
    """All who have sent requests. Raises AssertionError for what is not as it should be."""

    def __init__(self, world: World, info: EngineInfo, model: PlainModel, errors: set[str]):
        """
        Args:
            errors: names of those that a request may end with, for all that happens in this world.
        """
        self.world, self.info, self.model, self.errors = world, info, model, errors
        self.open: dict[str, Caller] = {}
        self.refused: set[str] = set()
        self.num_tokens = 0  # that were compared

    def sent(self, request: EngineRequest) -> None:
        """A request was taken."""
        self.open[request.request_id] = Caller(request, [Answer() for _ in range(request.params.n)])

    def take(self, outputs: Iterable[StepOutput]) -> list[Caller]:
        """Takes what has come; returns the callers who have all they asked for."""
        done = []
        for output in outputs:
            if isinstance(output, RequestFailed) and output.request_id in self.refused:
                continue  # others than those that it was sent with
            caller = self.open.get(output.request_id)
            assert caller is not None, f"nobody waits for {output}"
            match output:
                case TokenOutput():
                    self._token(caller, output)
                case PromptLogprobs():
                    assert output.first == 1 + len(caller.scores), "log-probabilities of a prompt come in order"
                    caller.scores += [one.logprob for one in output.tokens]
                case RequestFailed():
                    assert output.error in self.errors or self._never_fits(caller.request), f"not explained: {output}"
                    self.world.count(f"failed with {output.error}")
                    for answer in caller.answers:
                        answer.ended = answer.ended or "failed"
            if not caller.is_open:
                self.close(output.request_id)
                done.append(caller)
        return done

    def abort(self, request_id: str, index: int | None) -> None:
        """A caller does not want an answer any more, or any."""
        caller = self.open[request_id]
        for answer in caller.answers if index is None else caller.answers[index : index + 1]:
            answer.ended = answer.ended or "aborted"
        if not caller.is_open:
            self.close(request_id)

    def close(self, request_id: str) -> None:
        """Nothing more comes for a request: what has come is compared."""
        caller = self.open.pop(request_id)
        self.world.note("closed", request_id, [answer.tokens for answer in caller.answers])
        for index, answer in enumerate(caller.answers):
            self._compare(caller, index, answer)

    def _never_fits(self, request: EngineRequest) -> bool:
        """Whether an engine refuses a request, which may be found out late, when one runs again."""
        try:
            Scheduler(self.info).check(request)
        except CapacityError:
            return True
        return False

    def _token(self, caller: Caller, output: TokenOutput) -> None:
        answer = caller.answers[output.index]
        assert not answer.ended, f"{output} comes after the answer's end"
        answer.tokens.append(output.token_id)
        answer.logprobs.append(None if output.logprobs is None else output.logprobs.logprob)
        answer.ended = output.finish_reason or ""

    def _compare(self, caller: Caller, index: int, answer: Answer) -> None:
        request, tokens = caller.request, answer.tokens
        where = f"answer {index} of {request}"
        prompt_len = len(request.prompt_token_ids)
        rows = self.model.row_logits(request, tokens[:-1])
        for place, token in enumerate(tokens):
            logits = rows[prompt_len - 1 + place]
            wanted = self.model.next_token(
                request, index, logits, tokens[:place], self.info.vocab_size, self.info.eos_token_ids
            )
            assert token == wanted, f"token {place} is {token} and should be {wanted}: {tokens}, {where}"
            told = score(logits, token) if request.params.logprobs is not None else None
            assert answer.logprobs[place] == told, f"log-probability of token {place}, {where}"
            reason = self._reason(request, token, place + 1)
            is_last = place + 1 == len(tokens)
            assert reason == (answer.ended if is_last and answer.ended in ("stop", "length") else None), (
                f"it ends by {answer.ended!r} and not by {reason!r} at {place}: {tokens}, {where}"
            )
        self.num_tokens += len(tokens)
        if request.params.prompt_logprobs is not None:
            wanted_scores = [score(row, token) for row, token in zip(rows, request.prompt_token_ids[1:], strict=False)]
            assert caller.scores == wanted_scores[: len(caller.scores)], f"log-probabilities of the prompt, {where}"
            assert not tokens or len(caller.scores) == prompt_len - 1, f"they come before the first token, {where}"
        else:
            assert not caller.scores

    def _reason(self, request: EngineRequest, token: int, count: int) -> str | None:
        if not request.params.ignore_eos and token in self.info.eos_token_ids:
            return "stop"
        if token in request.stop_token_ids:
            return "stop"
        return "length" if count >= request.max_tokens else None
