"""A request that may have to be run again, by an engine that knows nothing of the first run."""

from array import array

import msgspec

from distkv.engine.protocol import EngineRequest, PromptLogprobs, RequestFailed, StepOutput, TokenOutput


class Replay:
    """A request in flight and what its caller has of it already.

    The seed is fixed in the request and neighbours change no bit, so a second run gives the same tokens: those that the
    caller has are compared and dropped.
    """

    def __init__(self, request: EngineRequest):
        self.request = request
        self.num_runs = 0  # that were begun
        self._given = [array("I") for _ in range(request.params.n)]  # the tokens of each answer that were passed on
        self._num_again = [0] * request.params.n  # how many of these this run has brought
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

    def run(self) -> list[tuple[str, int | None]]:
        """Begins a run. Returns the answers that are to be ended as soon as the engine has the request, since they are
        finished, or not wanted any more."""
        self.num_runs += 1
        self._num_again = [0] * len(self._given)
        return [(self.request.request_id, index) for index in self.closed]

    def close(self, index: int | None) -> None:
        """Ends an answer, with None all of them: nothing of it is passed on any more."""
        self._open.discard(index) if index is not None else self._open.clear()

    def pass_on(self, output: StepOutput) -> StepOutput | None:
        """What of an output of this run is new to the caller: the output itself, a part of it or None. An answer that
        has become another one ends the request."""
        match output:
            case TokenOutput():
                return self._token(output)
            case PromptLogprobs():
                return self._scores(output) if self._open else None
            case RequestFailed():
                is_open, self._open = self._open, set()
                return output if is_open else None

    def _token(self, output: TokenOutput) -> StepOutput | None:
        index = output.index
        if index not in self._open:
            return None
        given, at = self._given[index], self._num_again[index]
        if at < len(given):
            self._num_again[index] += 1
            if given[at] == output.token_id:
                return None
            self._open.clear()
            return RequestFailed(
                output.request_id, "DistKVError",
                f"the engine of this request was lost, and run again elsewhere its answer {index} has token "
                f"{output.token_id} in place of {given[at]} at position {at}: the engines' machines do not compute "
                "alike (see docs/invariance.md); send the request again",
            )  # fmt: skip
        given.append(output.token_id)
        self._num_again[index] += 1
        if output.finish_reason is not None:
            self._open.discard(index)
        return output

    def _scores(self, output: PromptLogprobs) -> StepOutput | None:
        end = output.first + len(output.tokens)
        known, self._num_scored = max(self._num_scored, output.first), max(self._num_scored, end)
        if end <= known:
            return None
        return msgspec.structs.replace(output, first=known, tokens=output.tokens[known - output.first :])
