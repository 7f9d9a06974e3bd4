"""Builds an answer that a user sees from the tokens that the engine samples."""

from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.frontend.end_tokens import StopReasons
from distkv.frontend.incremental_decoder import IncrementalDecoder
from distkv.frontend.stop_strings import StopStrings
from distkv.frontend.tokenizer import Tokenizer
from distkv.outputs import CompletionOutput, Logprob
from distkv.workers.sampling.sampled_token import TokenLogprobs


class Answer:
    """One answer: its tokens, its text, and whether a stop string ends it.

    It is read as a whole, with `output`, or in parts, with `take`: a part costs as much as it holds, however long the
    answer has become.
    """

    def __init__(self, request: EngineRequest, index: int, tokenizer: Tokenizer | None, reasons: StopReasons):
        params = request.params
        self._index = index
        self._tokenizer = tokenizer
        self._text_of = tokenizer and (tokenizer if params.skip_special_tokens else tokenizer.with_special_tokens)
        self._decoder = IncrementalDecoder(self._text_of, request.prompt_token_ids) if self._text_of else None
        self._stop_reasons = reasons
        self._keeps_stop = params.include_stop_str_in_output
        self._stop_strings = StopStrings(params.stop_strings, self._keeps_stop)
        self._num_unstopped = params.min_tokens  # tokens to come that no stop string may end
        self._with_logprobs = params.logprobs is not None
        self._cumulative_logprob = 0.0
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        # what was not taken
        self._text_pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def add(self, output: TokenOutput) -> None:
        """Takes the next token; the answer may be finished after it although the engine goes on."""
        self._token_ids.append(output.token_id)
        if output.logprobs is not None:
            self._cumulative_logprob += output.logprobs.logprob
            self._logprobs.append(logprob_table(output.token_id, output.logprobs, self._tokenizer))
        self._finish_reason = output.finish_reason
        self._stop_reason = None if output.stop_reason is None else self._stop_reasons[output.stop_reason]
        if self._decoder is None or self._text_of is None:
            return
        piece = self._decoder.add(output.token_id) if output.finish_reason != "stop" or self._keeps_stop else ""
        if output.finish_reason is not None:
            piece += self._decoder.finish()
            if self._keeps_stop and isinstance(self._stop_reason, str) and not self._text_of.has_text(output.token_id):
                piece += self._stop_reason.strip()  # of a special token
        self._text_pieces.append(self._stop_strings.add(piece, looks=self._num_unstopped <= 0))
        self._num_unstopped -= 1
        if self._stop_strings.found is not None:
            self._finish_reason, self._stop_reason = "stop", self._stop_strings.found
        if self.finished:
            self._text_pieces.append(self._stop_strings.release())

    def fail(self) -> None:
        """Ends the answer, which is not finished, where it stands."""
        self._finish_reason = "error"
        self._text_pieces.append(self._stop_strings.release())

    def output(self) -> CompletionOutput:
        """A copy of the answer so far, without what was taken."""
        self._text_pieces = ["".join(self._text_pieces)]
        return CompletionOutput(
            index=self._index,
            text=self._text_pieces[0],
            token_ids=list(self._token_ids),
            cumulative_logprob=self._cumulative_logprob if self._with_logprobs else None,
            logprobs=list(self._logprobs) if self._with_logprobs else None,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )

    def take(self) -> CompletionOutput:
        """Hands over what is new since the call before."""
        part = self.output()
        self._text_pieces, self._token_ids, self._logprobs = [], [], []
        return part


def logprob_table(token_id: int, logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The log-probabilities in the place of a token: its own among the likeliest ones."""

    def decoded(token: int) -> str | None:
        return tokenizer.token_text(token) if tokenizer else None

    table = {token: Logprob(logprob, rank, decoded(token)) for rank, (token, logprob) in enumerate(logprobs.top, 1)}
    table.setdefault(token_id, Logprob(logprobs.logprob, logprobs.rank, decoded(token_id)))
    return table
