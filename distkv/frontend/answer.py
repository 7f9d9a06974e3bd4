"""Builds the answers that a user sees from the tokens that the engine draws."""

from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.errors import DistKVError
from distkv.frontend.tokenizer import IncrementalDecoder, Tokenizer
from distkv.outputs import CompletionOutput, Logprob, RequestOutput
from distkv.workers.sampling.sampled_token import TokenLogprobs

TIERS = ("device", "host", "disk")


class Answer:
    """One answer: its tokens, its text, and whether a stop string ends it.

    With stop strings, the last characters are held back as long as they might be the beginning of one.
    """

    def __init__(self, request: EngineRequest, index: int, tokenizer: Tokenizer | None):
        self._params = request.params
        self._index = index
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer, request.prompt_token_ids) if tokenizer else None
        self._stops = request.params.stop_strings
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def add(self, output: TokenOutput) -> None:
        """Takes the next token; the answer may be finished after it although the engine goes on."""
        self._token_ids.append(output.token_id)
        if output.logprobs is not None:
            self._cumulative += output.logprobs.logprob
            self._logprobs.append(self._table(output.token_id, output.logprobs))
        self._finish_reason, self._stop_reason = output.finish_reason, output.stop_reason
        if self._decoder is None:
            return
        # the text of an end token is not part of the answer
        new = "" if output.finish_reason == "stop" else self._decoder.add(output.token_id)
        if output.finish_reason is not None:
            new += self._decoder.finish()
        self._text += new
        self._stop_at_string(len(new))

    def fail(self) -> None:
        """Ends the answer where it stands, unless it is finished."""
        if not self.finished:
            self._finish_reason = "error"

    def output(self) -> CompletionOutput:
        """The answer so far."""
        held_back = 0 if self.finished else max((len(stop) - 1 for stop in self._stops), default=0)
        asked = self._params.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text=self._text[: len(self._text) - held_back] if held_back < len(self._text) else "",
            token_ids=list(self._token_ids),
            cumulative_logprob=self._cumulative if asked else None,
            logprobs=list(self._logprobs) if asked else None,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )

    def _stop_at_string(self, num_new: int) -> None:
        """Cuts the text before the earliest stop string that the last `num_new` characters complete."""
        found = []
        for stop in self._stops:
            place = self._text.find(stop, max(0, len(self._text) - num_new - len(stop) + 1))
            if place >= 0:
                found.append((place, stop))
        if found:
            place, stop = min(found)
            self._text = self._text[:place]
            self._finish_reason, self._stop_reason = "stop", stop

    def _table(self, token_id: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        table = {
            token: Logprob(logprob, place, self._decoded(token))
            for place, (token, logprob) in enumerate(logprobs.top, 1)
        }
        table.setdefault(token_id, Logprob(logprobs.logprob, logprobs.rank, self._decoded(token_id)))
        return table

    def _decoded(self, token_id: int) -> str | None:
        return self._tokenizer.token_text(token_id) if self._tokenizer else None


class RequestState:
    """A request in flight and its answers."""

    def __init__(self, request: EngineRequest, prompt: str | None, tokenizer: Tokenizer | None):
        self.request = request
        self._prompt = prompt
        self._answers = [Answer(request, index, tokenizer) for index in range(request.params.n)]
        self._num_cached_tokens = (0, 0, 0)  # by tier
        self.error: DistKVError | None = None

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers)

    def fail(self, error: DistKVError) -> None:
        """Ends the answers that are not finished, with what they have."""
        self.error = error
        for answer in self._answers:
            answer.fail()

    def is_finished(self, index: int) -> bool:
        """Whether one of the answers is finished."""
        return self._answers[index].finished

    def add(self, output: TokenOutput) -> None:
        """Takes the next token of an answer that is not finished."""
        if any(output.num_cached_tokens):
            self._num_cached_tokens = output.num_cached_tokens
        self._answers[output.index].add(output)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[answer.output() for answer in self._answers],
            finished=self.finished,
            error=self.error,
            num_cached_tokens_by_tier=dict(zip(TIERS, self._num_cached_tokens, strict=True)),
        )
