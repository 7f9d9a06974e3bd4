"""An engine that dies under its server."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from anthropic import Anthropic
from anthropic import APIError as AnthropicError
from openai import APIError, InternalServerError, OpenAI

from distkv import AsyncLLM, Client, DistKVError, EngineUnavailable, SamplingParams, WorkerDied
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.engine.protocol import RequestFailed
from distkv.errors import StoreError
from distkv.frontend.conversation import Conversation
from distkv.server.app import make_app
from distkv.server.errors import ApiError
from distkv.server.kept_responses import KeptResponses
from distkv.server.options import ServerOptions
from distkv.server.service import Service

LONG: dict[str, Any] = {"model": "talker", "max_tokens": 2000, "stream": True}


class HereServer:
    """A server in a thread of this process, whose engine can be ended."""

    def __init__(self, folder: Path):
        self.llm = AsyncLLM(folder, page_size=16, device_kv_bytes="4MiB")
        self.service = Service(["talker"], ServerOptions())
        self._server = uvicorn.Server(
            uvicorn.Config(make_app(self.service), port=0, lifespan="off", log_level="error", ws="none")
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def die(self) -> None:
        """Has the engine end as it does when a rank is lost."""

        def lose(engine: EngineClient) -> None:
            raise WorkerDied(1, "10.0.0.2", "it was killed")

        with pytest.raises(WorkerDied):
            self.llm._front_end.thread.call(lose).result()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        asyncio.run(self.llm.close())


@pytest.fixture
def here(talker: Path) -> Iterator[HereServer]:
    server = HereServer(talker)
    yield server
    server.close()


def test_before_and_after(here: HereServer) -> None:
    """While the model is loaded, and after a rank is dead: most is refused with 503, and so is the health."""
    loading = httpx2.get(f"{here.url}/health", timeout=60)
    assert loading.status_code == 503 and int(loading.headers["retry-after"]) > 0 and "being loaded" in loading.text
    assert httpx2.get(f"{here.url}/livez", timeout=60).status_code == 200
    assert httpx2.get(f"{here.url}/plan/choices", timeout=60).json()["has_chat"], (
        "the planner links to the chat that is to come"
    )
    with OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(InternalServerError, match="being loaded"):
            client.completions.create(model="talker", prompt="Hello")
        here.service.loaded(here.llm)
        assert httpx2.get(f"{here.url}/health", timeout=60).status_code == 200
        chunks = client.completions.create(prompt="Hello", extra_body={"ignore_eos": True}, **LONG)
        next(iter(chunks))
        messages: Any = [{"role": "user", "content": "Hello"}]
        with Anthropic(base_url=here.url, api_key="none", max_retries=0) as anthropic, Client(here.url) as own:
            events = anthropic.messages.create(messages=messages, extra_body={"ignore_eos": True}, **LONG)
            outputs = own.stream("Hello", SamplingParams(max_tokens=2000, ignore_eos=True))
            next(iter(events)), next(outputs)
            here.die()
            with pytest.raises(APIError, match=r"rank 1 on node 10\.0\.0\.2 died"):
                list(chunks)
            with pytest.raises(AnthropicError, match=r"rank 1 on node 10\.0\.0\.2 died"):
                list(events)
            with pytest.raises(DistKVError, match=r"rank 1 on node 10\.0\.0\.2 died"):
                list(outputs)
        dead = httpx2.get(f"{here.url}/health", timeout=60)
        assert dead.status_code == 503 and "it was killed" in dead.json()["error"]["message"]
        assert "retry-after" not in dead.headers
        assert httpx2.get(f"{here.url}/livez", timeout=60).status_code == 503, "only a new process helps"
        with pytest.raises(InternalServerError, match="it was killed"):
            client.completions.create(model="talker", prompt="Hello")
    assert httpx2.get(f"{here.url}/version", timeout=60).status_code == 200


def test_an_engine_that_is_started_anew_is_told_and_kills_nobody(
    here: HereServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(engine: Engine) -> None:
        raise DistKVError("no engine has run for 2 s")

    here.service.loaded(here.llm)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "check_ready", wait)
        rebuilding = httpx2.get(f"{here.url}/health", timeout=60)
        assert rebuilding.status_code == 503 and int(rebuilding.headers["retry-after"]) > 0
        assert rebuilding.json()["error"]["message"] == "no engine has run for 2 s"
        assert httpx2.get(f"{here.url}/livez", timeout=60).status_code == 200
    assert httpx2.get(f"{here.url}/health", timeout=60).status_code == 200


def test_what_goes_wrong_in_a_route_is_told_as_json(
    here: HereServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    here.service.loaded(here.llm)
    monkeypatch.setattr("distkv.frontend.tokenizer.Tokenizer.encode", fail)
    failed = httpx2.post(f"{here.url}/v1/completions", json={"prompt": "Hello"}, timeout=60)
    assert failed.status_code == 500 and "ZeroDivisionError" in failed.json()["error"]["message"]
    assert failed.headers["x-request-id"] and "connection" not in failed.headers
    assert len(caplog.records) == 1, "the log has it once"


def test_a_silent_stream_is_kept_alive(here: HereServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error that comes after the first comment is an event."""
    monkeypatch.setattr("distkv.server.connection.KEEP_ALIVE_SECONDS", 0.05)
    waiting = threading.Event()

    def wait(*_: object) -> list[int]:
        waiting.wait(60)
        raise ApiError(500, "of words that are no Unicode: \ud800")

    here.service.loaded(here.llm)
    monkeypatch.setattr("distkv.frontend.tokenizer.Tokenizer.encode", wait)
    body = {"prompt": "Hello", "stream": True}
    with httpx2.stream("POST", f"{here.url}/v1/completions", json=body, timeout=60) as stream:
        parts = stream.iter_bytes()
        said = next(parts) + next(parts)
        waiting.set()
        said += b"".join(parts)
    assert stream.status_code == 200 and said.startswith(b": still at it\n\n: still at it\n\n")
    assert rb'Unicode: \ud800", "type": "server_error"' in said and said.endswith(b"data: [DONE]\n\n")


def test_a_body_that_stops_coming_is_given_up(here: HereServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkv.server.middleware.SILENCE_SECONDS", 0.1)
    host, _, port = here.url.removeprefix("http://").partition(":")
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as half:
        half.sendall(head + b'{"prompt"')
        assert half.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_while_it_sends_is_no_mistake(here: HereServer, caplog: pytest.LogCaptureFixture) -> None:
    here.service.loaded(here.llm)
    coming: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"items"', "more_body": True}, {"type": "http.disconnect"}
    ]  # fmt: skip
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return coming.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
    scope = {
        "type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers,
        "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "scheme": "http",
    }  # fmt: skip
    app: Any = make_app(here.service)
    asyncio.run(app(scope, receive, send))
    assert said[0]["status"] == 499 and not caplog.records


def test_a_request_that_would_fail_again_is_no_503(here: HereServer) -> None:
    here.service.loaded(here.llm)
    harsh = {"prompt": [5, 6, 7] * 9, "repetition_penalty": 1e-50, "temperature": 0}
    failed = httpx2.post(f"{here.url}/v1/completions", json=harsh, timeout=60)
    assert failed.status_code == 500 and "repetition_penalty 1e-50" in failed.json()["error"]["message"]


def test_a_request_that_has_waited_for_an_engine_in_vain_may_come_again(
    here: HereServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(engine: Engine) -> list[RequestFailed]:
        names = [one.request.request_id for one in engine._scheduler.waiting]
        engine.abort([(name, None) for name in names])
        return [RequestFailed(name, "EngineUnavailable", "no room") for name in names]

    here.service.loaded(here.llm)
    monkeypatch.setattr(Engine, "step", give_up)
    failed = httpx2.post(f"{here.url}/v1/completions", json={"prompt": "Hello"}, timeout=60)
    assert failed.status_code == 503 and int(failed.headers["retry-after"]) > 0
    assert failed.json()["error"]["code"] == "EngineUnavailable"
    with Client(here.url) as client:
        [output] = client.generate("Hello", use_tqdm=False)
    assert isinstance(output.error, EngineUnavailable) and str(output.error) == "no room"


@pytest.mark.parametrize("body", [{"prompt": "ab"}, {"prompt": ["ab", "b"], "n": 2}])
def test_limits_that_leave_no_token_are_the_clients_mistake(here: HereServer, body: dict[str, Any]) -> None:
    """A 503 would have clients send the same again."""
    here.service.loaded(here.llm)
    limits = {"structured_outputs": {"choice": ["a"]}, "min_tokens": 12}
    refused = httpx2.post(f"{here.url}/v1/completions", json=body | limits, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "RequestError"
    assert "min_tokens and structured_outputs leave no token" in refused.json()["error"]["message"]


def test_an_answer_that_cannot_be_stored_is_told(here: HereServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("no room")

    here.service.loaded(here.llm)
    monkeypatch.setattr("distkv.server.kept_responses.KeptResponses.keep", fail)
    body = {"input": "Hello", "max_output_tokens": 4, "ignore_eos": True}
    told = httpx2.post(f"{here.url}/v1/responses", json=body, timeout=60)
    assert told.status_code == 200 and told.json()["usage"]["output_tokens"] == 4
    assert told.json()["store"] is False and told.json()["session_error"] == "no room"
    events = httpx2.post(f"{here.url}/v1/responses", json=body | {"stream": True}, timeout=60).text
    assert "response.incomplete" in events and '"session_error":"no room"' in events


def test_a_response_is_not_looked_for_in_the_event_loop(here: HereServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All streams would wait for a slow disk."""
    in_loop, begin = [], KeptResponses.begin

    def watched(self: KeptResponses, previous: str | None) -> Conversation:
        in_loop.append(threading.current_thread() is here._thread)
        return begin(self, previous)

    here.service.loaded(here.llm)
    monkeypatch.setattr(KeptResponses, "begin", watched)
    for previous, status in ((None, 200), ("resp_" + "0" * 32, 404)):
        for stream in (False, True):
            body = {"input": "Hello", "max_output_tokens": 4, "previous_response_id": previous, "stream": stream}
            assert httpx2.post(f"{here.url}/v1/responses", json=body, timeout=60).status_code == status
    assert in_loop == [False] * 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_more_answers_than_can_run_take_no_place(here: HereServer, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Or all others would be told that the queue is full."""
    here.service.loaded(here.llm)
    asked: list[int] = []
    monkeypatch.setattr(here.llm._front_end.queue, "taken", asked.append)
    body = {"n": 10**6, "max_tokens": 1, "stream": True}
    body |= {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    refused = httpx2.post(here.url + path, json=body, timeout=60)
    assert refused.status_code == 400 and "max_num_seqs" in refused.text and not asked


def test_a_stream_ends_whose_body_stops_coming(here: HereServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """For nobody can tell whether its client is still there."""
    here.service.loaded(here.llm)
    monkeypatch.setattr("distkv.server.middleware.SILENCE_SECONDS", 3.0)
    host, _, port = here.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(b"GET /live HTTP/1.1\r\nhost: here\r\ncontent-length: 5\r\n\r\n")
        half.settimeout(60)
        said = b""
        while part := half.recv(65536):
            said += part
    assert said.startswith(b"HTTP/1.1 200 ") and b"tokens_per_second" in said
    assert b"the rest of the body has not come for 3 s" in said


def test_a_stream_that_has_not_begun_and_whose_body_stops_coming_is_given_up(
    here: HereServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.service.loaded(here.llm)
    monkeypatch.setattr("distkv.server.middleware.SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(here.llm, "stats", lambda: asyncio.sleep(60))
    host, _, port = here.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as half:
        half.sendall(b"GET /live HTTP/1.1\r\nhost: here\r\ncontent-length: 5\r\n\r\n")
        assert half.recv(4096).startswith(b"HTTP/1.1 408 ")
