"""Builds the answers that a user sees from the tokens that the engine samples."""

from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.errors import DistKVError
from distkv.frontend.answer_text import AnswerText
from distkv.frontend.tokenizer import IncrementalDecoder, Tokenizer
from distkv.outputs import CompletionOutput, Logprob, RequestOutput
from distkv.sampling_params import RequestOutputKind
from distkv.workers.sampling.sampled_token import TokenLogprobs

TIERS = ("device", "host", "disk")


class Answer:
    """One answer: its tokens, its text, and why it ends. It holds what has not been taken as a delta."""

    def __init__(self, request: EngineRequest, index: int, tokenizer: Tokenizer | None):
        self._asked_logprobs = request.params.logprobs is not None
        self._index = index
        self._tokenizer = tokenizer
        decoder = IncrementalDecoder(tokenizer, request.prompt_token_ids) if tokenizer else None
        self._text = AnswerText(decoder, request.params.stop_strings)
        self._pieces: list[str] = []  # of the text
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self.has_grown = False  # since it was taken last

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def add(self, output: TokenOutput) -> None:
        """Takes the next token; the answer may be finished after it although the engine goes on."""
        self.has_grown = True
        self._token_ids.append(output.token_id)
        if output.logprobs is not None:
            self._cumulative += output.logprobs.logprob
            self._logprobs.append(self._table(output.token_id, output.logprobs))
        self._finish_reason, self._stop_reason = output.finish_reason, output.stop_reason
        self._pieces.append(self._text.add(output.token_id, self.finished, is_text=output.finish_reason != "stop"))
        if self._text.stopped_by is not None:
            self._finish_reason, self._stop_reason = "stop", self._text.stopped_by

    def fail(self) -> None:
        """Ends the answer where it stands, unless it is finished."""
        if not self.finished:
            self.has_grown = True
            self._pieces.append(self._text.finish())
            self._finish_reason = "error"

    def output(self) -> CompletionOutput:
        """The answer so far."""
        self._pieces = ["".join(self._pieces)]
        return self._output(self._pieces[0], list(self._token_ids), list(self._logprobs))

    def take(self) -> CompletionOutput:
        """What is new since this was called last."""
        pieces, token_ids, logprobs = self._pieces, self._token_ids, self._logprobs
        self._pieces, self._token_ids, self._logprobs = [], [], []
        self.has_grown = False
        return self._output("".join(pieces), token_ids, logprobs)

    def _output(self, text: str, token_ids: list[int], logprobs: list[dict[int, Logprob]]) -> CompletionOutput:
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=self._cumulative if self._asked_logprobs else None,
            logprobs=logprobs if self._asked_logprobs else None,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )

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

    def next_output(self) -> RequestOutput | None:
        """What a reader of all steps gets next, as the request's `output_kind` says; None when that is nothing yet."""
        kind = self.request.params.output_kind
        if kind is RequestOutputKind.DELTA:
            grown = [answer for answer in self._answers if answer.has_grown]
            return self._output([answer.take() for answer in grown]) if grown else None
        return self.output() if self.finished or kind is RequestOutputKind.CUMULATIVE else None

    def output(self) -> RequestOutput:
        """The request as it stands, less what was taken as a delta."""
        return self._output([answer.output() for answer in self._answers])

    def _output(self, answers: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=answers,
            finished=self.finished,
            error=self.error,
            num_cached_tokens_by_tier=dict(zip(TIERS, self._num_cached_tokens, strict=True)),
        )
