"""The Python API: text in, text out."""

import queue
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from distkv.config import EngineConfig, EngineOptions
from distkv.engine.client import EngineClient
from distkv.engine.loop import Delivery
from distkv.engine.stats import EngineStats
from distkv.engine.thread import EngineThread
from distkv.frontend.front_end import Facade, FrontEnd
from distkv.frontend.messages import Message
from distkv.frontend.request_checks import Prompt, one_each, plain_prompts
from distkv.frontend.request_group import RequestGroup
from distkv.frontend.request_state import RequestState
from distkv.option_checks import settle_path
from distkv.outputs import CacheExport, CacheImport, RequestOutput
from distkv.sampling_params import SamplingParams
from distkv.workers.threads import release_threads


class LLM(Facade):
    """A LLaMA model, ready to generate. Use it as a context manager, or call `close()`.

    The engine runs in a thread of this process, or with more than one rank as Ray actors. Several threads may call an
    LLM at a time; what they ask for runs together. In an event loop use `AsyncLLM`; LLM works in one too, a notebook's
    say, and blocks it meanwhile.

    Example:
        with LLM("path/to/model") as llm:
            print(llm.generate("Once upon a time")[0].outputs[0].text)
    """

    def __init__(self, model: str | Path, **options: Unpack[EngineOptions]):
        """Loads the model. The arguments are those of `EngineConfig`, which says what each means.

        Raises ConfigError for an option or a model that cannot be used, CapacityError when the memory does not suffice,
        WorkerDied when a rank ends while it starts.
        """
        self._front_end = FrontEnd(EngineConfig(model=model, **options))
        self._front_end.wait()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int | list[int] = 0,
        cache_salt: str | list[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts, all of them together, and returns when the last one is done.

        Args:
            prompts: one prompt or a list of them, each a text or token ids, in a list or an array, or a dict
                `{"prompt": text}` or `{"prompt_token_ids": ids}`, which may have its own `cache_salt`.
            sampling_params: for all prompts, or one for each.
            priority: for all prompts, or one for each; lower goes first, and equal ones go in order of arrival.
            cache_salt: for all prompts, or one for each; pages of a prompt are shared among requests of one salt only,
                and None is a salt too.
            use_tqdm: show a progress bar on stderr.

        Returns one output per prompt, in their order; one that could not go on has its `error` set, and the others are
        whole. That is so for every `output_kind`: with DELTA the whole answer is one delta. Raises RequestError or
        CapacityError, before anything runs, for a prompt that cannot be answered, QueueFull when too many answers wait,
        WorkerDied when a rank is lost, and DistKVError when the LLM is closed meanwhile.
        """
        prompts = plain_prompts(prompts)
        params = one_each("sampling_params", _or_default(sampling_params), len(prompts))
        priorities = one_each("priority", priority, len(prompts))
        salts = one_each("cache_salt", cache_salt, len(prompts))
        states = [self._request(*one) for one in zip(prompts, params, priorities, salts, strict=True)]
        return self._finish_all(states, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int | list[int] = 0,
        cache_salt: str | list[str | None] | None = None,
        session: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues one conversation or a list of them by the assistant's answer; else as `generate`.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, or a list of such lists. Content may be a list of
                parts `{"type": "text", "text": "..."}`, which are joined by line breaks. Fields that are None are left
                out, and others that the chat template does not use are refused.
            session: name of one conversation that is kept in cache_dir, for this process and later ones. `messages` are
                what is new in it; what was said before comes first, and they are added to it with their answer.
            tools: functions that the chat template tells the model of, as OpenAI has them. What it answers is text.
            chat_template_kwargs: variables of the chat template, `{"enable_thinking": False}`, say. These and tools are
                refused where the template does not use them.

        With a session, raises ConfigError without a cache_dir and while another call uses it. An answer that cannot be
        written is returned with a StoreError as its `error`, and the session does not go on from it.
        """
        if session is not None:
            return self._chat_on(
                session, messages, sampling_params, priority, cache_salt, tools, chat_template_kwargs, use_tqdm
            )
        several = isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple)
        conversations: list[Any] = list(messages) if several else [messages]
        prompts = [self.tokenizer.encode_chat(one, tools, chat_template_kwargs) for one in conversations]
        return self.generate(prompts, sampling_params, priority=priority, cache_salt=cache_salt, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Answers one prompt and yields an output of the `output_kind` of its parameters whenever there is more of the
        answer: the answer so far, or what is new of it, or the finished one alone. The last output is finished.

        The engine does not wait for a slow reader. Leaving the iterator early ends the request. Raises as `generate`
        does, and when the request cannot go on the error that `generate` has in the output, with that as its `output`.
        """
        return self._outputs(self._request(prompt, _or_default(sampling_params), priority, cache_salt))

    def stats(self) -> EngineStats:
        """What the engine tells of itself: requests, tiers, what moves, how long things take."""
        return self._front_end.told(self._front_end.thread.stats().result())

    def reset_prefix_cache(self) -> None:
        """Forgets the pages of ended requests that are kept for later ones."""
        self._front_end.thread.reset_prefix_cache().result()

    def export_cache(
        self,
        path: str | Path,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        sessions: Sequence[str] = (),
        everything: bool = False,
        cache_salt: str | None = None,
    ) -> CacheExport:
        """Writes what was read to a file, with its KV pages, for `import_cache` of engines of the same weights.

        Args:
            path: NAME.zarr for a folder, NAME.zarr.zip for a single file; nothing may be there.
            prompts: as for `generate`; of each the full pages that are there.
            sessions: names of sessions, whose messages are in the file too.
            everything: all pages of the salt.
            cache_salt: that of the requests which made the pages. The file does not have it.

        Returns how much is in the file, and of each prompt how many tokens. Raises ConfigError where there is no
        cache_dir on this machine, or the file cannot be made; RequestError when none of that is in the cache;
        StoreError when it cannot be written.
        """
        from distkv.cache_folders.export_store import check_target, new_store  # imports zarr
        from distkv.frontend.live_cache import export_live

        target = settle_path("path", path)
        check_target(target)
        return export_live(self._front_end, new_store(target), prompts, sessions, everything, cache_salt)

    def import_cache(self, path: str | Path, *, cache_salt: str | None = None) -> CacheImport:
        """Takes a file of `export_cache` in, while requests run. Import only what you trust: nothing shows whether
        pages are those of their tokens.

        Args:
            path: the file, as the node of the first rank sees it too.
            cache_salt: of requests that are to find the pages.

        Returns how many pages the file has, and how many were not there before. Raises ConfigError for a file of other
        weights or options, StoreError for one that is damaged, and takes in nothing then; CapacityError when the disk
        tier has no room for it.
        """
        from distkv.frontend.live_cache import import_live  # imports zarr

        return import_live(self._front_end, settle_path("path", path), cache_salt)

    def drain(self, timeout: float | None = None) -> None:
        """Takes no more requests, and returns when none runs any more, so that `close` cuts nothing off.

        Args:
            timeout: seconds after which what still runs is ended: its outputs have a Draining error, and what there is
                of the answers. None waits for all of it.
        """
        thread = self._front_end.thread
        assert isinstance(thread, EngineThread)
        try:
            thread.drain().result(timeout)
        except TimeoutError:
            thread.drain(at_once=True).result()

    def close(self) -> None:
        """Frees the model and, with Ray, every process and resource that was taken. What other threads still wait for
        ends with a DistKVError. A second call does nothing."""
        self._front_end.thread.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _engine(self) -> EngineClient:
        """For tests; see `EngineThread.engine`."""
        thread = self._front_end.thread
        assert isinstance(thread, EngineThread)
        return thread.engine

    def _request(self, prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str | None) -> RequestState:
        return self._front_end.request(self._front_end.next_number(), prompt, params, priority, cache_salt)

    def _chat_on(
        self,
        name: str,
        messages: list[Any],
        params: Any,
        priority: Any,
        cache_salt: Any,
        tools: Any,
        chat_template_kwargs: Any,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """A turn of a session."""
        [one] = one_each("sampling_params", _or_default(params), 1)
        with self._front_end.session(name, one) as session:
            prompt = session.prompt(self.tokenizer, messages, tools, chat_template_kwargs)
            outputs = self.generate(prompt, one, priority=priority, cache_salt=cache_salt, use_tqdm=use_tqdm)
            return outputs if outputs[0].error else [session.keep(outputs[0])]

    def _finish_all(self, states: list[RequestState], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        with tqdm(total=len(states), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            for due in self._drive(states):
                bar.update(sum(state.finished for state in due))
        return [state.emit() for state in states]

    def _outputs(self, state: RequestState) -> Generator[RequestOutput, None, None]:
        with closing(self._drive([state])) as steps:  # so that closing this generator aborts at once
            for _ in steps:
                output = state.emit()
                if output.error is not None:
                    raise output.error
                yield output

    def _drive(self, states: list[RequestState]) -> Generator[list[RequestState], None, None]:
        """Runs requests to their end, yielding those that are to emit an output after a step; what is unfinished at
        exit is aborted."""
        release_threads()  # of the caller, who waits
        inbox: queue.SimpleQueue[list[Delivery]] = queue.SimpleQueue()
        group = RequestGroup(self._front_end.thread, states)
        with self._front_end.queue.taken(sum(state.request.params.n for state in states)):
            try:
                group.start(inbox.put)
                while group.unfinished:
                    due = group.take(inbox.get())
                    if group.error is not None:
                        raise group.error
                    if due:
                        yield due
            finally:
                group.end()


def _or_default(params: Any) -> Any:
    return SamplingParams() if params is None else params
