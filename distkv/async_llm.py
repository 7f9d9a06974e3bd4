"""The Python API for event loops: answers that grow while others run."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from distkv.config import EngineConfig, EngineOptions
from distkv.engine.loop import Delivery
from distkv.engine.stats import EngineStats
from distkv.engine.thread import EngineThread, RunningEngine
from distkv.errors import DistKVError, Draining
from distkv.frontend.front_end import Facade, FrontEnd
from distkv.frontend.messages import Message
from distkv.frontend.request_checks import Prompt
from distkv.frontend.request_group import RequestGroup
from distkv.frontend.session_opening import open_in_thread
from distkv.option_checks import settle_path
from distkv.outputs import CacheExport, CacheImport, RequestOutput, join_deltas
from distkv.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:  # it imports zarr
    from distkv.cache_folders.export_store import Put

_create_waits = ContextVar("_create_waits", default=False)
"""Whether `AsyncLLM.create` waits for what is being made, so that `__init__` does not."""


class AsyncLLM(Facade):
    """A LLaMA model that answers many requests at a time, as they come. Use it as an async context manager, or call
    `close()`.

    The engine runs in a thread of its own, or on Ray as with `LLM`. Several event loops may share one object.

    Example:
        async with await AsyncLLM.create("path/to/model") as llm:
            async for output in llm.generate("Once upon a time"):
                print(output.outputs[0].text)
    """

    def __init__(self, model: str | Path, **options: Unpack[EngineOptions]):
        """Loads the model, and blocks meanwhile; in a running event loop use `create`. As `LLM` otherwise."""
        self._front_end = FrontEnd(EngineConfig(model=model, **options))
        self._mailbox: _Mailbox | None = None
        if not _create_waits.get():
            self._front_end.wait()

    @classmethod
    async def create(cls, model: str | Path, **options: Unpack[EngineOptions]) -> Self:
        """A new `AsyncLLM`, loaded while the event loop goes on. Nothing is left of one whose task is cancelled: what
        it has loaded is freed in the background. The `__init__` of a subclass runs before the model is loaded."""
        waits = _create_waits.set(True)
        try:
            llm = cls(model, **options)
        finally:
            _create_waits.reset(waits)
        try:
            await asyncio.to_thread(llm._front_end.wait)
        except BaseException:
            llm._front_end.thread.give_up()
            raise
        return llm

    @classmethod
    async def over(cls, config: EngineConfig, engine: RunningEngine) -> Self:
        """One whose engine runs elsewhere, which it closes in the end; the tokenizer is here all the same."""
        llm = cls.__new__(cls)
        llm._front_end, llm._mailbox = FrontEnd(config, engine), None
        await asyncio.to_thread(llm._front_end.wait)
        return llm

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one prompt and yields an output of the `output_kind` of its parameters whenever there is more of the
        answer: the answer so far, or what is new of it, or the finished one alone. The last output is finished.

        Cancelling the task or closing the iterator ends the request; leaving the loop early closes an iterator that has
        no other name. For a reader that is slower than the engine outputs merge; it misses no text.

        Args:
            prompt: a text or token ids, in any form that `LLM.generate` takes.
            priority: lower goes first; requests of one priority go in order of arrival.
            cache_salt: the prompt's pages are shared with requests of the same salt only; None is a salt too.

        Raises RequestError or CapacityError for a prompt that cannot be answered, QueueFull when too many answers wait,
        WorkerDied when a rank is lost, DistKVError when the LLM is closed, and when the request cannot go on an error
        whose `output` has what there is of it.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        with self._front_end.place(params):
            async with aclosing(self._answer(prompt, params, priority, cache_salt)) as outputs:
                async for output in outputs:
                    yield output

    async def _answer(
        self, prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a request that has its place."""
        number = self._front_end.next_number()
        state = await asyncio.to_thread(self._front_end.request, number, prompt, params, priority, cache_salt)
        group, due = RequestGroup(self._front_end.thread, [state]), asyncio.Event()
        mailbox = self._mailbox_of_loop()
        mailbox.groups[state.request.request_id] = group, due
        try:
            group.start(mailbox.put)
            while group.unfinished or due.is_set():
                await due.wait()
                due.clear()
                if group.error is not None:
                    raise group.error
                output = state.emit()
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            group.end()
            del mailbox.groups[state.request.request_id]

    async def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        session: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continues a conversation `[{"role": "user", "content": "..."}, ...]` by the assistant's answer; else as
        `generate`.

        Args:
            session: name of a conversation that is kept, as with `LLM.chat`. Of an answer that is left early,
                or that `drain` has ended, the conversation gets what was yielded, with FINAL_ONLY nothing. The last
                output has a StoreError as its `error` when the answer cannot be written.
            tools, chat_template_kwargs: as with `LLM.chat`.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        with self._front_end.place(params):  # before there is any work with it
            if session is not None:
                outputs = self._chat_on(session, messages, params, priority, cache_salt, tools, chat_template_kwargs)
            else:
                prompt = await asyncio.to_thread(self.tokenizer.encode_chat, messages, tools, chat_template_kwargs)
                outputs = self._answer(prompt, params, priority, cache_salt)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output

    @property
    def num_open(self) -> int:
        """Answers that are being computed or wait."""
        return self._front_end.queue.num_open

    def check_count(self, count: int) -> None:
        """Raises CapacityError for more answers at once than can ever run and wait."""
        self._front_end.queue.check(count)

    def check_health(self) -> None:
        """Raises what has ended the engine, if anything has; waits for nothing."""
        self._front_end.thread.check_alive()

    async def check_ready(self) -> None:
        """Raises DistKVError while no engine could answer and requests wait for one, Draining once `drain` was called,
        and as `check_health`."""
        await asyncio.wrap_future(self._front_end.thread.check_ready())

    async def stats(self) -> EngineStats:
        """What the engine tells of itself: requests, tiers, what moves, how long things take."""
        return self._front_end.told(await asyncio.wrap_future(self._front_end.thread.stats()))

    async def reset_prefix_cache(self) -> None:
        """Forgets the pages of ended requests that are kept for later ones."""
        await asyncio.wrap_future(self._front_end.thread.reset_prefix_cache())

    async def export_cache(
        self,
        path: str | Path,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        sessions: Sequence[str] = (),
        everything: bool = False,
        cache_salt: str | None = None,
    ) -> CacheExport:
        """Writes what was read to a file, as `LLM.export_cache` does."""
        from distkv.cache_folders.export_store import check_target, new_store  # imports zarr

        target = settle_path("path", path)
        check_target(target)
        return await asyncio.to_thread(
            self.export_to, new_store(target), prompts, sessions=sessions, everything=everything, cache_salt=cache_salt
        )

    def export_to(
        self,
        store: "AbstractContextManager[Put]",
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        sessions: Sequence[str] = (),
        everything: bool = False,
        cache_salt: str | None = None,
    ) -> CacheExport:
        """The same to a store of `export_store.py`, for a thread that may wait."""
        from distkv.frontend.live_cache import export_live  # imports zarr

        return export_live(self._front_end, store, prompts, sessions, everything, cache_salt)

    async def import_cache(self, path: str | Path, *, cache_salt: str | None = None) -> CacheImport:
        """Takes a file in, as `LLM.import_cache` does."""
        from distkv.frontend.live_cache import import_live  # imports zarr

        return await asyncio.to_thread(import_live, self._front_end, settle_path("path", path), cache_salt)

    async def drain(self, timeout: float | None = None) -> None:
        """Takes no more requests, and returns when none runs any more, as `LLM.drain` does."""
        thread = self._front_end.thread
        assert isinstance(thread, EngineThread), "the engine is not ours to end"
        _, running = await asyncio.wait([asyncio.wrap_future(thread.drain())], timeout=timeout)
        if running:
            await asyncio.wrap_future(thread.drain(at_once=True))

    async def close(self) -> None:
        """Ends what runs with a DistKVError, and frees everything as `LLM.close` does."""
        await asyncio.to_thread(self._front_end.thread.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _chat_on(
        self,
        name: str,
        messages: list[Message],
        params: SamplingParams,
        priority: int,
        cache_salt: str | None,
        tools: list[dict[str, Any]] | None,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """A turn of a session."""
        with await open_in_thread(partial(self._front_end.session, name, params)) as session:
            prompt = await asyncio.to_thread(session.prompt, self.tokenizer, messages, tools, chat_template_kwargs)
            outputs = self._answer(prompt, params, priority, cache_salt)
            yielded: list[RequestOutput] = []  # that add up to the answer
            try:
                async with aclosing(outputs):
                    async for output in outputs:
                        if params.output_kind is not RequestOutputKind.DELTA:
                            yielded.clear()
                        yielded.append(output)
                        if output.finished:
                            kept, yielded = session.keep(join_deltas(yielded)), []
                            output = replace(output, error=kept.error)
                        yield output
            except Draining:
                raise
            except DistKVError:
                yielded.clear()  # an answer that could not go on
                raise
            finally:
                if yielded:
                    session.keep(join_deltas(yielded))

    def _mailbox_of_loop(self) -> "_Mailbox":
        """The mailbox of the running event loop; requests keep the one they have begun with."""
        loop = asyncio.get_running_loop()
        mailbox = self._mailbox  # which another loop's thread may replace meanwhile
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = _Mailbox(loop)
        return mailbox


class _Mailbox:
    """Brings what comes from the engine's thread into an event loop, once per step for all requests of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.groups: dict[str, tuple[RequestGroup, asyncio.Event]] = {}  # by request

    def put(self, deliveries: list[Delivery]) -> None:
        """A `Sink`."""
        self.loop.call_soon_threadsafe(self._sort, deliveries)

    def _sort(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.request_id in self.groups:
                group, due = self.groups[delivery.request_id]
                try:
                    if group.take([delivery]) or group.error:
                        due.set()
                except Exception as error:  # text that cannot be decoded, say
                    group.error = error
                    due.set()
