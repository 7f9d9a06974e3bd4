"""What `LLM` and `AsyncLLM` have in common: an engine in its thread, and the way from prompts to answers."""

import itertools
import logging
import weakref
from pathlib import Path

from distkv.config import EngineConfig
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.thread import EngineThread
from distkv.errors import ConfigError, RequestError
from distkv.frontend.answer import RequestState
from distkv.frontend.session import Session
from distkv.frontend.tokenizer import Tokenizer
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams

log = logging.getLogger(__name__)

Prompt = str | list[int]
"""A prompt as text or as token ids."""


class FrontEnd:
    """Checks requests and makes answers of what the engine samples. All methods may be called by any thread."""

    def __init__(self, config: EngineConfig):
        """Loads the model; raises as `LLM` does."""
        engine = launch(config)
        self.config = config
        self.info: EngineInfo = engine.info
        self.thread = EngineThread(engine)
        weakref.finalize(self, self.thread.close)  # an LLM that nobody closes
        self._numbers = itertools.count()
        self._tokenizer: Tokenizer | None = None
        try:
            self._tokenizer = Tokenizer(Path(config.model))
        except ConfigError as error:
            self._no_tokenizer = str(error)
            log.warning(self._no_tokenizer)
        except BaseException:
            self.thread.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError when the model folder has none."""
        if self._tokenizer is None:
            raise ConfigError(self._no_tokenizer)
        return self._tokenizer

    def next_number(self) -> int:
        """A new request's number, which gives it a seed where its parameters do not."""
        return next(self._numbers)

    def request(
        self, number: int, prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str | None
    ) -> RequestState:
        """Checks a prompt and makes it a request; raises RequestError."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {params!r}; it must be a SamplingParams")
        if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
            raise RequestError(f"priority is {priority!r}; it must be an integer of 64 bits, and lower goes first")
        if cache_salt is not None and not _is_text(cache_salt):
            raise RequestError(f"cache_salt is {cache_salt!r}; it must be a text, or None to share with all others")
        if not isinstance(prompt, str | list):
            raise RequestError(f"a prompt is {prompt!r}; it must be a text or a list of token ids")
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_tokens(token_ids)
        if self._tokenizer is None and params.stop_strings:
            raise RequestError("stop strings need text, and the model has no tokenizer; use stop_token_ids")
        room = self.info.max_model_len - len(token_ids)
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=params.seed if params.seed is not None else (self.info.seed << 32) + number,
            priority=priority,
            cache_salt=cache_salt,
        )
        return RequestState(request, text, self._tokenizer)

    def session(self, name: str, params: SamplingParams) -> Session:
        """Opens a conversation for one more turn; raises ConfigError as `Session` does, RequestError for other than one
        answer."""
        if self.config.cache_dir is None:
            raise ConfigError(f"session {name!r} needs a folder to be kept in; set cache_dir")
        if params.n != 1:
            raise RequestError(f"n is {params.n}, and a session goes on with one answer; leave n out")
        return Session(self.config.cache_dir, name)

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


class Facade:
    """What `LLM` and `AsyncLLM` tell of their front end alike."""

    _front_end: FrontEnd

    @property
    def config(self) -> EngineConfig:
        """The options."""
        return self._front_end.config

    @property
    def info(self) -> EngineInfo:
        """What the engine has fixed at start."""
        return self._front_end.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError when the model folder has none."""
        return self._front_end.tokenizer


def _is_text(value: object) -> bool:
    """Whether it is a str of Unicode, without the lone surrogates that stand for bytes of other encodings."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False
