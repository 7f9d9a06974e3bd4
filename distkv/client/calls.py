"""What the two clients have in common: calls made of arguments, and outputs of events."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import msgspec

from distkv.client import wire
from distkv.engine.stats import EngineStats
from distkv.errors import ConfigError, DistKVError, RequestError
from distkv.frontend.messages import Message, plain_messages
from distkv.frontend.request_checks import one_each, plain_priority, plain_prompt, plain_prompts, plain_salt
from distkv.outputs import RequestOutput, join_deltas
from distkv.sampling_params import RequestOutputKind, SamplingParams
from distkv.values import shown

KEY_VARIABLE = "DISTKV_API_KEY"
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 90.0
"""After which a server is given up; one that is at work says something every quarter of a minute."""


def settings(url: str, api_key: str | None) -> dict[str, Any]:
    """The arguments of httpx2's clients."""
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ConfigError(f"url is {shown(url)}; give that of a server, such as http://127.0.0.1:8000")
    return {
        "base_url": url.rstrip("/").removesuffix("/v1"),
        "headers": {} if key is None else {"authorization": f"Bearer {key}"},
        "timeout": httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
        "limits": httpx2.Limits(max_connections=None),
    }


def prompt_items(prompts: Any, params: Any, priority: Any, cache_salt: Any, kind: RequestOutputKind) -> list[wire.Item]:
    """The requests of `generate`; raises RequestError for what is no prompt."""
    plain = [plain_prompt(one) for one in plain_prompts(prompts)]
    shared = _shared(len(plain), params, priority, cache_salt, kind)
    items = []
    for prompt, (sampling, rank, salt) in zip(plain, shared, strict=True):
        what = prompt.text if prompt.token_ids is None else prompt.token_ids
        own = plain_salt(salt, prompt.cache_salt)
        items.append(wire.Item(sampling, prompt=what, priority=rank, cache_salt=own))
    return items


def chat_items(
    messages: Any, params: Any, priority: Any, cache_salt: Any, session: str | None, **template: Any
) -> list[wire.Item]:
    """The requests of `chat`, with what is for the chat template; raises RequestError for what is no conversation."""
    several = isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple)
    if several and session is not None:
        raise RequestError("a session is one conversation, and messages are several; give one")
    conversations: list[list[Message]] = [plain_messages(one) for one in (messages if several else [messages])]
    shared = _shared(len(conversations), params, priority, cache_salt, RequestOutputKind.FINAL_ONLY)
    return [
        wire.Item(sampling, messages=one, priority=rank, cache_salt=salt, session=session, **template)
        for one, (sampling, rank, salt) in zip(conversations, shared, strict=True)
    ]


def stream_items(prompt: Any, params: Any, priority: Any, cache_salt: Any) -> tuple[list[wire.Item], RequestOutputKind]:
    """The request of `stream`, and the kind of the outputs that its caller wants: what has been said so far is put
    together here."""
    wanted = (params or SamplingParams()).output_kind
    on_wire = wanted if wanted is RequestOutputKind.FINAL_ONLY else RequestOutputKind.DELTA
    return prompt_items([prompt], params, priority, cache_salt, on_wire), wanted


def engine_stats(response: httpx2.Response) -> EngineStats:
    """What the server tells of its engine."""
    check(response, response.content)
    return msgspec.json.decode(response.content, type=EngineStats)


class Answers:
    """The outputs of requests, as events bring them."""

    def __init__(self, count: int):
        self._last: list[RequestOutput | None] = [None] * count
        self._rest = b""  # of an event that is not whole

    def take(self, data: bytes, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> Iterator[RequestOutput]:
        """Reads a part of the stream, wherever it is cut, and yields the outputs of that kind that it brings. Raises
        the error that ends all of them."""
        # not by the lines of a text, which end at other characters too
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield self._output(wire.decode_event(event.removeprefix(b"data: ")), kind)

    def finished(self) -> list[RequestOutput]:
        """All last outputs; raises DistKVError where the server has stopped before them."""
        found = [output for output in self._last if output is not None and output.finished]
        if len(found) < len(self._last):
            raise DistKVError("the server ended before its answers did; see whether it was stopped")
        return found

    def _output(self, event: wire.Event, kind: RequestOutputKind) -> RequestOutput:
        if event.error is not None:
            raise event.error.error()
        assert event.index is not None and event.output is not None
        output, before = event.output, self._last[event.index]
        if kind is RequestOutputKind.CUMULATIVE and before is not None:
            output = join_deltas([before, output])
        if output.error is not None:
            output.error.output = output
        self._last[event.index] = output
        return output


def check(response: httpx2.Response, body: bytes) -> None:
    """Raises the error that a response tells of."""
    if response.is_success:
        return
    try:
        failure = msgspec.json.decode(body, type=dict[str, wire.Failure])["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        failure = wire.Failure(f"{response.url} answers with status {response.status_code}; is it a distkv server?")
    raise failure.error(response.status_code)


def unreachable(url: httpx2.URL, error: httpx2.TransportError) -> DistKVError:
    """What to raise when the connection fails."""
    return DistKVError(
        f"the server at {url} cannot be reached, or has gone away ({type(error).__name__}: {error}); start it with "
        "'distkv serve', or give another url"
    )


def _shared(
    count: int, params: Any, priority: Any, cache_salt: Any, kind: RequestOutputKind
) -> Sequence[tuple[wire.Params, int, str | None]]:
    """What each of so many requests has of arguments that they may share."""
    given = one_each("sampling_params", SamplingParams() if params is None else params, count)
    for one in given:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params is {shown(one)}; it must be a SamplingParams")
    made = [wire.Params(**(msgspec.structs.asdict(one) | {"output_kind": kind})) for one in given]
    ranks = [plain_priority(one) for one in one_each("priority", priority, count)]
    salts = [plain_salt(one) for one in one_each("cache_salt", cache_salt, count)]
    return list(zip(made, ranks, salts, strict=True))
