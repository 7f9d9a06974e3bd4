"""The Python API: text in, text out."""

import itertools
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from distkv import errors
from distkv.answer import RequestState
from distkv.config import EngineConfig
from distkv.errors import ConfigError, DistKVError, RequestError
from distkv.launch import launch
from distkv.messages import EngineInfo, EngineRequest, EngineStats, RequestFailed, StepOutput
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

    def __init__(
        self,
        model: str | Path,
        *,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        page_size: int = 256,
        seed: int = 0,
        ray_address: str | None = None,
        device: str = "auto",
        device_kv_bytes: int | str | None = None,
        host_kv_bytes: int | str | None = None,
        disk_kv_bytes: int | str | None = None,
        cache_dir: str | Path | None = None,
        staging_pages: int | None = None,
        enable_prefix_caching: bool = True,
        disk_write_policy: str = "write_through",
        max_cold_bytes_per_step: int | str | None = None,
        gpu_memory_utilization: float = 0.9,
        load_format: str = "auto",
        num_threads: int | None = None,
    ):
        """Loads the model. The arguments are those of `EngineConfig`, which says what each means.

        Raises ConfigError for an option or a model that cannot be used, CapacityError when the memory does not suffice,
        WorkerDied when a rank ends while it starts.
        """
        self.config = EngineConfig(
            model=model,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            seed=seed,
            ray_address=ray_address,
            device=device,
            device_kv_bytes=device_kv_bytes,
            host_kv_bytes=host_kv_bytes,
            disk_kv_bytes=disk_kv_bytes,
            cache_dir=cache_dir,
            staging_pages=staging_pages,
            enable_prefix_caching=enable_prefix_caching,
            disk_write_policy=disk_write_policy,
            max_cold_bytes_per_step=max_cold_bytes_per_step,
            gpu_memory_utilization=gpu_memory_utilization,
            load_format=load_format,
            num_threads=num_threads,
        )
        self._engine: EngineClient | None = launch(self.config)
        self.info: EngineInfo = self._engine.info
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_error: DistKVError | None = None
        self._numbers = itertools.count()
        self._states: dict[str, RequestState] = {}  # requests in flight, of all iterators

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

        Returns one output per prompt, in their order; one that could not go on has its `error` set, and the others are
        whole. Raises RequestError or CapacityError, before anything runs, for a prompt that cannot be answered, and
        WorkerDied when a rank is lost.
        """
        listed = _listed(prompts)
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
        one = not messages or isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if one else list(messages)
        prompts = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answers one prompt and yields the output so far whenever there is more of it; the last one is finished.

        Leaving the iterator early ends the request. Raises as `generate` does, and StoreError or CapacityError when the
        request cannot go on.
        """
        return self._outputs(self._request(prompt, sampling_params or SamplingParams()))

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
        if not isinstance(prompt, str | list):
            raise RequestError(f"a prompt is {prompt!r}; it must be a text or a list of token ids")
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

    def _outputs(self, state: RequestState) -> Iterator[RequestOutput]:
        with closing(self._drive([state])) as grown:  # so that closing this generator aborts at once
            for _ in grown:
                if state.error is not None:
                    raise state.error
                yield state.output()

    def _drive(self, states: list[RequestState]) -> Generator[RequestState, None, None]:
        """Runs requests to their end, yielding each whenever it has grown; what is unfinished at exit is aborted."""
        engine = self._live_engine()
        unfinished = {state.request.request_id: state for state in states}
        self._states |= unfinished
        try:
            engine.add([state.request for state in states])
            while unfinished:
                grown = [state for state in unfinished.values() if state.take_growth()]
                for state in grown:
                    if state.finished:
                        del unfinished[state.request.request_id]
                    yield state
                if not grown:
                    self._step()
        finally:
            for request_id in unfinished:
                self._states.pop(request_id, None)
            if unfinished and self._engine is not None:
                self._engine.abort([(request_id, None) for request_id in unfinished])

    def _step(self) -> None:
        """Waits for the next tokens and gives each to its request, whichever iterator that belongs to."""
        engine = self._live_engine()
        for token in engine.step():
            state = self._states.get(token.request_id)
            if state is None:
                continue  # it was aborted while the token was on its way
            if isinstance(token, RequestFailed):
                state.fail(getattr(errors, token.error)(token.message))
                del self._states[token.request_id]
                continue
            if state.add(token) and token.finish_reason is None:  # at a stop string, which the engine cannot see
                engine.abort([(token.request_id, token.index)])
            if state.finished:
                del self._states[token.request_id]


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is {prompts!r}; give a text, a list of token ids, or a list of these")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [list(prompts)]
    return list(prompts)


class EngineClient(Protocol):
    """An engine as a front end sees it, in this process or on a cluster."""

    info: EngineInfo

    def add(self, requests: list[EngineRequest]) -> None:
        """Queues requests. Raises CapacityError, and queues none, when one of them could never run."""

    def abort(self, answers: list[tuple[str, int | None]]) -> None:
        """Ends answers `(request id, index)`, with index None all of a request."""

    def step(self) -> list[StepOutput]:
        """Waits for the next tokens, or for a request to fail. Raises WorkerDied when a rank is lost."""
        ...

    def stats(self) -> EngineStats:
        """State of the KV cache."""
        ...

    def close(self) -> None:
        """Frees everything."""
