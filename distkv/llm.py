"""The Python API: text in, text out."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from distkv.answer import RequestState
from distkv.config import EngineConfig
from distkv.errors import ConfigError, DistKVError, RequestError
from distkv.launch import launch
from distkv.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput
from distkv.outputs import RequestOutput
from distkv.sampling_params import SamplingParams
from distkv.tokenizer import Message, Tokenizer

log = logging.getLogger(__name__)

Prompt = str | list[int]
"""A prompt as text or as token ids."""


class LLM:
    """A LLaMA model, ready to generate. Use it as a context manager, or call `close()`.

    One rank runs in this process; more run as Ray actors. Not for use by several threads at a time.

    Example:
        with LLM("path/to/model") as llm:
            print(llm.generate("Once upon a time")[0].outputs[0].text)
    """

    def __init__(self, model: str | Path, **options: Any):
        """Loads the model.

        Args:
            model: path of a Hugging Face model folder.
            options: fields of `EngineConfig`, such as tensor_parallel_size, dtype, max_model_len or device_kv_bytes.

        Raises ConfigError for an option or a model that cannot be used, CapacityError when the memory does not suffice,
        WorkerDied when a rank ends while it starts.
        """
        try:
            self.config = EngineConfig(model, **options)
        except TypeError as error:
            raise ConfigError(f"{error}; the options are the fields of distkv.EngineConfig") from None
        self._engine: EngineClient | None = launch(self.config)
        self.info: EngineInfo = self._engine.info
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_error: DistKVError | None = None
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts, all of them together, and returns when the last one is done.

        Args:
            prompts: one prompt or a list of them, each a text or a list of token ids.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar on stderr.

        Returns one output per prompt, in their order. Raises RequestError or CapacityError, before anything runs, for a
        prompt that cannot be answered, and WorkerDied when a rank is lost.
        """
        single = isinstance(prompts, str) or (bool(prompts) and all(isinstance(token, int) for token in prompts))
        listed: list[Any] = [prompts] if single else list(prompts)
        if isinstance(sampling_params, list):
            if len(sampling_params) != len(listed):
                raise RequestError(
                    f"{len(listed)} prompts came with {len(sampling_params)} sampling_params; give one each"
                )
            params = sampling_params
        else:
            params = [sampling_params or SamplingParams()] * len(listed)
        states = [self._request(*pair) for pair in zip(listed, params, strict=True)]
        return self._finish_all(states, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues one conversation or a list of them by the assistant's answer; else as `generate`.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, or a list of such lists.
        """
        if not messages:
            raise RequestError("there are no messages; give at least one, such as {'role': 'user', 'content': 'Hello'}")
        conversations: list[Any] = [messages] if isinstance(messages[0], dict) else list(messages)
        prompts = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answers one prompt and yields the output so far whenever there is more of it; the last one is finished.

        Leaving the iterator early ends the request.
        """
        state = self._request(prompt, sampling_params or SamplingParams())
        return (grown.output() for grown in self._drive([state]))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded on first use. Raises ConfigError when the model folder has none."""
        tokenizer = self._load_tokenizer()
        if tokenizer is None:
            assert self._tokenizer_error is not None
            raise self._tokenizer_error
        return tokenizer

    def stats(self) -> EngineStats:
        """State of the KV cache."""
        return self._live_engine().stats()

    def close(self) -> None:
        """Frees the model and, with Ray, every process and resource that was taken. A second call does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _live_engine(self) -> "EngineClient":
        if self._engine is None:
            raise DistKVError("this LLM is closed; make a new one")
        return self._engine

    def _load_tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None and self._tokenizer_error is None:
            try:
                self._tokenizer = Tokenizer(Path(self.config.model))
            except ConfigError as error:
                log.warning("%s", error)
                self._tokenizer_error = error
        return self._tokenizer

    def _request(self, prompt: Prompt, params: SamplingParams) -> RequestState:
        """Checks a prompt and makes it a request."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {params!r}; it must be a SamplingParams")
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_tokens(token_ids)
        room = self.info.max_model_len - len(token_ids)
        number = next(self._numbers)
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=params.seed if params.seed is not None else (self.info.seed << 32) + number,
        )
        tokenizer = self._load_tokenizer()
        if tokenizer is None and params.stop_strings:
            raise RequestError("stop strings need text, and the model has no tokenizer; use stop_token_ids")
        return RequestState(request, text, tokenizer)

    def _check_tokens(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.info.vocab_size:
                raise RequestError(f"the prompt has token id {token!r}; ids are integers below {self.info.vocab_size}")
        if len(token_ids) >= self.info.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens and max_model_len is {self.info.max_model_len}, with one for "
                "the answer; shorten the prompt or raise max_model_len"
            )

    def _finish_all(self, states: list[RequestState], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        with tqdm(total=len(states), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            for state in self._drive(states):
                bar.update(state.finished)
        return [state.output() for state in states]

    def _drive(self, states: list[RequestState]) -> Iterator[RequestState]:
        """Runs requests to their end, yielding each whenever it has grown; what is unfinished at exit is aborted."""
        engine = self._live_engine()
        running = {state.request.request_id: state for state in states}
        try:
            engine.add([state.request for state in states])
            while running:
                grown: dict[str, RequestState] = {}
                for token in engine.step():
                    state = running.get(token.request_id)
                    if state is None:
                        continue
                    if (
                        state.add(token) and token.finish_reason is None
                    ):  # at a stop string, which the engine cannot see
                        engine.abort([(token.request_id, token.index)])
                    grown[token.request_id] = state
                for request_id, state in grown.items():
                    if state.finished:
                        del running[request_id]
                    yield state
        finally:
            if running and self._engine is not None:
                engine.abort([(request_id, None) for request_id in running])


class EngineClient(Protocol):
    """An engine as a front end sees it, in this process or on a cluster."""

    info: EngineInfo

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests. Raises CapacityError, and queues none, when one of them could never run."""

    def abort(self, answers: list[tuple[str, int | None]]) -> None:
        """Ends answers `(request id, index)`, with index None all of a request."""

    def step(self) -> list[TokenOutput]:
        """Waits for the next tokens. Raises WorkerDied when a rank is lost."""
        ...

    def stats(self) -> EngineStats:
        """State of the KV cache."""
        ...

    def close(self) -> None:
        """Frees everything."""
