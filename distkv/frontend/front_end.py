"""What `LLM` and `AsyncLLM` have in common: an engine in its thread, and the way from prompts to requests."""

import itertools
import logging
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from distkv.config import EngineConfig
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.request_bounds import check_tokens
from distkv.engine.stats import EngineStats
from distkv.engine.thread import EngineThread, RunningEngine
from distkv.errors import ConfigError, RequestError
from distkv.frontend.bad_words import bad_words_token_ids
from distkv.frontend.end_tokens import stop_reasons
from distkv.frontend.request_checks import (
    Prompt,
    check_params,
    check_prompt_length,
    plain_priority,
    plain_prompt,
    plain_salt,
)
from distkv.frontend.request_queue import RequestQueue
from distkv.frontend.request_state import RequestState
from distkv.frontend.session import Session
from distkv.frontend.session_limits import SessionLimits
from distkv.frontend.tokenizer import Tokenizer, TokenLimit
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams
from distkv.structured_outputs.grammars import make_grammar

log = logging.getLogger(__name__)


class FrontEnd:
    """An engine and the tokenizer of its model. All methods may be called by any thread."""

    def __init__(self, config: EngineConfig, engine: RunningEngine | None = None):
        """Begins to load the model, unless `engine` has it; `wait` must come before all else."""
        self.config = config
        self.thread: RunningEngine = EngineThread(partial(launch, config)) if engine is None else engine
        self.info: EngineInfo
        self.queue: RequestQueue
        self._numbers = itertools.count()
        self._tokenizer: Tokenizer | None = None

    def wait(self) -> None:
        """Waits until the model is loaded; raises as `LLM` does, having freed everything."""
        try:
            info = self.thread.wait()
            try:
                limit = self._token_limit(info.max_model_len)
                self._tokenizer = Tokenizer(Path(self.config.model), info.eos_token_ids, limit)
                info = replace(info, eos_token_ids=tuple(sorted(self._tokenizer.end_token_ids)))
            except ConfigError as error:
                self._no_tokenizer = str(error)
                log.warning(self._no_tokenizer)
            self.info = info
            self.queue = RequestQueue(self.config.max_queued_requests, info.max_num_seqs * info.num_engines)
        except BaseException:
            self.thread.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError when the model folder has none."""
        if self._tokenizer is None:
            raise ConfigError(self._no_tokenizer)
        return self._tokenizer

    def place(self, params: SamplingParams) -> AbstractContextManager[None]:
        """Holds the places of a request's answers among those that run and wait; raises as `RequestQueue.taken` and
        `check_params` do."""
        check_params(params, self.info)
        return self.queue.taken(params.n)

    def told(self, stats: EngineStats) -> EngineStats:
        """What the engine tells of itself, with what it does not know: the answers that it was not asked for."""
        return replace(stats, num_refused=self.queue.num_refused)

    def next_number(self) -> int:
        """A new request's number, from which its seed is made where its parameters have none."""
        return next(self._numbers)

    def request(
        self, number: int, prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str | None
    ) -> RequestState:
        """Checks a prompt and makes it a request; raises RequestError, CapacityError for too many answers, and
        DistKVError in a forked process."""
        self.thread.check_process()
        check_params(params, self.info)
        text, given, own_salt = plain_prompt(prompt)
        priority, cache_salt = plain_priority(priority), plain_salt(cache_salt, own_salt)
        token_ids = given if given is not None else self.tokenizer.encode(text or "")
        check_prompt_length(token_ids, self.config.max_prompt_tokens)
        check_tokens(token_ids, self.info)
        if self._tokenizer is None and params.stop_strings:
            raise RequestError("stop strings need text, and the model has no tokenizer; use stop_token_ids")
        reasons = stop_reasons(params, self.info, self._tokenizer)
        if params.structured_outputs is not None:
            make_grammar(self.info.model, self.info.vocab_size, params.structured_outputs, frozenset(reasons))
        room = self.info.max_model_len - len(token_ids)
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=params.seed if params.seed is not None else (self.info.seed << 32) + number,
            priority=priority,
            cache_salt=cache_salt,
            stop_token_ids=frozenset(reasons),
            bad_words_token_ids=bad_words_token_ids(params.bad_words or [], self._tokenizer),
        )
        return RequestState(request, text, self._tokenizer, reasons, self.info.kv_policy)

    def session(self, name: str, params: SamplingParams) -> Session:
        """Opens a conversation for one more turn; raises ConfigError and CapacityError as `Session` does, RequestError
        for other than one answer, DistKVError in a forked process."""
        self.thread.check_process()
        if self.config.cache_dir is None:
            raise ConfigError(f"session {name!r} needs a folder to be kept in; set cache_dir")
        check_params(params, self.info)
        if params.n != 1:
            raise RequestError(f"n is {params.n}, and a session goes on with one answer; leave n out")
        return Session(self.config.cache_dir, name, SessionLimits.of(self.config))

    def _token_limit(self, max_model_len: int) -> TokenLimit:
        most = self.config.max_prompt_tokens
        if most is None or most >= max_model_len:
            return TokenLimit("max_model_len", max_model_len)
        return TokenLimit("max_prompt_tokens", most)


class Facade:
    """What `LLM` and `AsyncLLM` say of their front end alike."""

    _front_end: FrontEnd

    @property
    def config(self) -> EngineConfig:
        """The options."""
        return self._front_end.config

    @property
    def info(self) -> EngineInfo:
        """What the engine decided at start."""
        return self._front_end.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError when the model folder has none."""
        return self._front_end.tokenizer
