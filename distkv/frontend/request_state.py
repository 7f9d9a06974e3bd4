"""A request on its way, as the front end sees it."""

from distkv.engine.protocol import EngineRequest, PromptLogprobs, TokenOutput
from distkv.errors import DistKVError
from distkv.frontend.answer import Answer, logprob_table
from distkv.frontend.end_tokens import StopReasons
from distkv.frontend.tokenizer import Tokenizer
from distkv.outputs import Logprob, RequestOutput
from distkv.sampling_params import RequestOutputKind

TIERS = ("device", "host", "disk")


class RequestState:
    """A request in flight, its answers, and which of them have grown since its last output.

    Tokens come in with `add`, outputs of the kind that the request asks for go out with `emit`. Several tokens may come
    between two outputs, which then merge.
    """

    def __init__(
        self, request: EngineRequest, prompt: str | None, tokenizer: Tokenizer | None, reasons: StopReasons,
        kv_policy: str | None = None,
    ):  # fmt: skip
        """`kv_policy` is what outputs say of it."""
        self.request = request
        self._kv_policy = kv_policy
        self.error: DistKVError | None = None
        self._prompt = prompt
        self._kind = request.params.output_kind
        self._answers = [Answer(request, index, tokenizer, reasons) for index in range(request.params.n)]
        self._unfinished = set(range(request.params.n))
        self._grown: set[int] = set()  # indexes of answers
        self._num_cached_tokens = (0, 0, 0)  # by tier
        self._tokenizer = tokenizer
        # of the first tokens of the prompt; None once they were handed over, or where they are not asked for
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        return not self._unfinished

    @property
    def is_due(self) -> bool:
        """Whether a request that has grown is to emit an output now."""
        return self.finished or self._kind is not RequestOutputKind.FINAL_ONLY

    def is_finished(self, index: int) -> bool:
        """Whether one of the answers is finished."""
        return index not in self._unfinished

    def add(self, output: TokenOutput) -> None:
        """Takes the next token of an answer that is not finished."""
        if any(output.num_cached_tokens):
            self._num_cached_tokens = output.num_cached_tokens
        answer = self._answers[output.index]
        answer.add(output)
        self._grown.add(output.index)
        if answer.finished:
            self._unfinished.remove(output.index)

    def add_prompt_logprobs(self, logprobs: PromptLogprobs) -> None:
        """Takes those of the next tokens of the prompt."""
        tables, token_ids = self._prompt_logprobs, self.request.prompt_token_ids
        assert tables is not None and len(tables) == logprobs.first
        for token_id, found in zip(token_ids[len(tables) :], logprobs.tokens, strict=False):
            tables.append(logprob_table(token_id, found, self._tokenizer))

    def fail(self, error: DistKVError) -> None:
        """Ends the answers that are not finished, with what they have."""
        self.error = error
        for index in self._unfinished:
            self._answers[index].fail()
        self._grown |= self._unfinished
        self._unfinished.clear()

    def emit(self) -> RequestOutput:
        """The next output: all answers as they stand, and with DELTA what is new of those that have grown."""
        prompt_logprobs = self._prompt_logprobs
        if prompt_logprobs is not None and len(prompt_logprobs) < len(self.request.prompt_token_ids):
            prompt_logprobs = None
        if self._kind is RequestOutputKind.DELTA:
            outputs = [self._answers[index].take() for index in sorted(self._grown)]
            self._prompt_logprobs = None
        else:
            outputs = [answer.output() for answer in self._answers]
        self._grown.clear()
        output = RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            error=self.error,
            num_cached_tokens_by_tier=dict(zip(TIERS, self._num_cached_tokens, strict=True)),
            prompt_logprobs=prompt_logprobs,
            kv_policy=self._kv_policy,
        )
        if self.error is not None:
            self.error.output = output
        return output
