"""`Client`: the methods of `LLM` over HTTP."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx2

from distkv.client import calls, wire
from distkv.engine.stats import EngineStats
from distkv.frontend.messages import Message
from distkv.frontend.request_checks import Prompt
from distkv.outputs import RequestOutput
from distkv.sampling_params import RequestOutputKind, SamplingParams


class Client:
    """A model that `distkv serve` serves, with the methods of `LLM` and their outputs. Use it as a context manager, or
    call `close()`. Several threads may use it at a time.

    Example:
        with Client("http://127.0.0.1:8000") as client:
            print(client.generate("Once upon a time")[0].outputs[0].text)
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None):
        """Connects to nothing yet; without `api_key` the one in DISTKV_API_KEY is sent, if there is one. Raises
        ConfigError for what is no URL."""
        self._http = httpx2.Client(**calls.settings(url, api_key))

    @classmethod
    def attach(cls, name: str, *, ray_address: str | None = None, api_key: str | None = None) -> "Client":
        """A client of the server that `distkv serve --name` has registered at a Ray cluster by this name, or else of
        the Ray Serve application of this name. Afterwards it needs Ray no more.

        Args:
            ray_address: the cluster, as for `LLM`; none is started. This machine must be one of its nodes.
            api_key: in place of the key that the server has registered; without either as for `Client`.

        Raises ConfigError when the cluster cannot be joined, when nobody has the name, and when the server cannot be
        reached from here; DistKVError when the cluster does not answer.
        """
        from distkv.client.attach import find  # imports ray

        found = find(name, ray_address)
        return cls(found.url, api_key=found.api_key if api_key is None else api_key)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int | list[int] = 0,
        cache_salt: str | list[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts, all of them together, as `LLM.generate` does.

        Returns one output per prompt, in their order; one that could not go on has its `error` set. Raises what
        `LLM.generate` raises, ConfigError for a wrong key, CapacityError when the server's queue is full, and
        DistKVError when the server cannot be reached or ends meanwhile.
        """
        kind = RequestOutputKind.FINAL_ONLY
        return self._finish(calls.prompt_items(prompts, sampling_params, priority, cache_salt, kind), use_tqdm)

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
        """Continues one conversation or a list of them by the assistant's answer, as `LLM.chat` does; a `session` is
        kept by the server. Else as `generate`."""
        items = calls.chat_items(
            messages, sampling_params, priority, cache_salt, session, tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )  # fmt: skip
        return self._finish(items, use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Answers one prompt and yields its outputs as `LLM.stream` does. Leaving the iterator early ends the request.
        Raises as `generate` does, and the `error` of a request that cannot go on."""
        items, wanted = calls.stream_items(prompt, sampling_params, priority, cache_salt)
        return self._outputs(items, wanted)

    def stats(self) -> EngineStats:
        """State of the KV cache."""
        with self._reaching():
            response = self._http.get(wire.STATS)
        return calls.engine_stats(response)

    def reset_prefix_cache(self) -> None:
        """Forgets the pages of ended requests that are kept for later ones."""
        with self._reaching():
            response = self._http.post(wire.RESET, json={})
        calls.check(response, response.content)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, items: list[wire.Item], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        answers = calls.Answers(len(items))
        with tqdm(total=len(items), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            for part in self._parts(items):
                bar.update(sum(1 for _ in answers.take(part)))
        return answers.finished()

    def _outputs(self, items: list[wire.Item], kind: RequestOutputKind) -> Generator[RequestOutput, None, None]:
        answers = calls.Answers(1)
        for part in self._parts(items):
            for output in answers.take(part, kind):
                if output.error is not None:
                    raise output.error
                yield output
        answers.finished()

    def _parts(self, items: list[wire.Item]) -> Iterator[bytes]:
        if not items:
            return
        content = wire.encode(wire.Call(items))
        headers = {"content-type": "application/json"}
        with (
            self._reaching(),
            self._http.stream("POST", wire.GENERATE, content=content, headers=headers) as response,
        ):
            if not response.is_success:
                calls.check(response, response.read())
            yield from response.iter_bytes()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise calls.unreachable(self._http.base_url, error) from error
