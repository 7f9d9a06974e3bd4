"""`AsyncClient`: the methods of `LLM` over HTTP, for event loops."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Any

import httpx2

from distkv.client import calls, wire
from distkv.engine.stats import EngineStats
from distkv.frontend.messages import Message
from distkv.frontend.request_checks import Prompt
from distkv.outputs import RequestOutput
from distkv.sampling_params import RequestOutputKind, SamplingParams


class AsyncClient:
    """`Client` for an event loop: the same methods, to be awaited. Use it as an async context manager, or call
    `close()`. Cancelling a call ends its requests.

    Example:
        async with AsyncClient("http://127.0.0.1:8000") as client:
            async for output in client.stream("Once upon a time"):
                print(output.outputs[0].text)
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None):
        """As `Client`."""
        self._http = httpx2.AsyncClient(**calls.settings(url, api_key))

    @classmethod
    async def attach(cls, name: str, *, ray_address: str | None = None, api_key: str | None = None) -> "AsyncClient":
        """As `Client.attach`; the event loop goes on meanwhile."""
        from distkv.client.attach import find  # imports ray

        found = await asyncio.to_thread(find, name, ray_address)
        return cls(found.url, api_key=found.api_key if api_key is None else api_key)

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int | list[int] = 0,
        cache_salt: str | list[str | None] | None = None,
    ) -> list[RequestOutput]:
        """As `Client.generate`."""
        kind = RequestOutputKind.FINAL_ONLY
        return await self._finish(calls.prompt_items(prompts, sampling_params, priority, cache_salt, kind))

    async def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int | list[int] = 0,
        cache_salt: str | list[str | None] | None = None,
        session: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `Client.chat`."""
        items = calls.chat_items(
            messages, sampling_params, priority, cache_salt, session, tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )  # fmt: skip
        return await self._finish(items)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `Client.stream`."""
        items, wanted = calls.stream_items(prompt, sampling_params, priority, cache_salt)
        answers = calls.Answers(1)
        async with aclosing(self._parts(items)) as parts:
            async for part in parts:
                for output in answers.take(part, wanted):
                    if output.error is not None:
                        raise output.error
                    yield output
        answers.finished()

    async def stats(self) -> EngineStats:
        """State of the KV cache."""
        with self._reaching():
            response = await self._http.get(wire.STATS)
        return calls.engine_stats(response)

    async def reset_prefix_cache(self) -> None:
        """Forgets the pages of ended requests that are kept for later ones."""
        with self._reaching():
            response = await self._http.post(wire.RESET, json={})
        calls.check(response, response.content)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _finish(self, items: list[wire.Item]) -> list[RequestOutput]:
        answers = calls.Answers(len(items))
        async with aclosing(self._parts(items)) as parts:
            async for part in parts:
                for _ in answers.take(part):
                    """It is kept there."""
        return answers.finished()

    async def _parts(self, items: list[wire.Item]) -> AsyncGenerator[bytes, None]:
        if not items:
            return
        content = wire.encode(wire.Call(items))
        headers = {"content-type": "application/json"}
        with self._reaching():
            async with self._http.stream("POST", wire.GENERATE, content=content, headers=headers) as response:
                if not response.is_success:
                    calls.check(response, await response.aread())
                async for part in response.aiter_bytes():
                    yield part

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise calls.unreachable(self._http.base_url, error) from error
