"""A request that may have to be run again, by an engine that knows nothing of the first run."""

from array import array

import msgspec

from distkv.engine.protocol import EngineRequest, PromptLogprobs, RequestFailed, StepOutput, TokenOutput


class Replay:
    """A request in flight and what its caller has of it already.

    A second run goes on behind the tokens that the caller has (`EngineRequest.begun`). Seed and positions are those of
    the first one and neighbours change no bit, so the tokens are those that it would have brought.
    """

    def __init__(self, request: EngineRequest):
        self.request = request
        self.num_runs = 0  # that were begun
        self._given = [array("I") for _ in range(request.params.n)]  # the tokens of each answer that were passed on
        self._open = set(range(request.params.n))
        self._num_scored = 0  # tokens of the prompt whose log-probabilities were passed on, with the first one

    @property
    def is_open(self) -> bool:
        """Whether an answer is still to be finished."""
        return bool(self._open)

    @property
    def num_open(self) -> int:
        """Answers that are still to be finished."""
        return len(self._open)

    @property
    def closed(self) -> list[int]:
        """The other ones."""
        return [index for index in range(len(self._given)) if index not in self._open]

    def run(self) -> EngineRequest:
        """Begins a run; returns what the engine is to be given. Answers that are `closed` are to be ended as soon as it
        has that."""
        self.num_runs += 1
        if not any(self._given):
            return self.request
        return msgspec.structs.replace(
            self.request, begun={index: self._given[index].tolist() for index in sorted(self._open)}
        )

    def close(self, index: int | None) -> None:
        """Ends an answer, with None all of them: nothing of it is passed on any more."""
        self._open.discard(index) if index is not None else self._open.clear()

    def pass_on(self, output: StepOutput) -> StepOutput | None:
        """What of an output of this run is new to the caller: the output itself, a part of it or None."""
        match output:
            case TokenOutput():
                return self._token(output)
            case PromptLogprobs():
                return self._scores(output) if self._open else None
            case RequestFailed():
                is_open, self._open = self._open, set()
                return output if is_open else None

    def _token(self, output: TokenOutput) -> StepOutput | None:
        if output.index not in self._open:
            return None
        self._given[output.index].append(output.token_id)
        if output.finish_reason is not None:
            self._open.discard(output.index)
        return output

    def _scores(self, output: PromptLogprobs) -> StepOutput | None:
        end = output.first + len(output.tokens)
        known, self._num_scored = max(self._num_scored, output.first), max(self._num_scored, end)
        if end <= known:
            return None
        return msgspec.structs.replace(output, first=known, tokens=output.tokens[known - output.first :])
