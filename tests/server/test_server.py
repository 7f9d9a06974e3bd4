"""A server as a process: who may come in, how much they may ask for, how it starts and ends."""

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from support.commands import Run
from support.servers import ServerProcess

from distkv import Client, ConfigError, QueueFull, SamplingParams, __version__
from distkv.server.options import ServerOptions

KEY = "a-secret key"
NO_ASCII: dict[Any, Any] = {"authorization": b"Basic \xe9"}
BEARER = {"authorization": f"Bearer {KEY}"}
LONG: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def guarded(talker: Path) -> Iterator[ServerProcess]:
    """One that wants a key, listens everywhere, and has little room."""
    flags = (
        "--host", "0.0.0.0", "--max-num-seqs", "1", "--max-queued-requests", "0", "--max-body-bytes", "2kB",
        "--num-threads", "1", "--device-kv-bytes", "4MiB", "--host-kv-bytes", "0",
    )  # fmt: skip
    with ServerProcess(talker, *flags, env=os.environ | {"DISTKV_API_KEY": KEY}) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/stats", "/openapi.json", "/", "/nowhere"])
def test_a_key_guards_every_route_but_the_health(guarded: ServerProcess, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": ""},
        NO_ASCII,
    ):
        refused = guarded.get(path, headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key" and "www-authenticate" in refused.headers
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    for headers in (BEARER, {"x-api-key": KEY}, {"authorization": f"Basic {basic}"}):
        assert guarded.get(path, headers=headers).status_code == (404 if path == "/nowhere" else 200)
    assert guarded.get("/health").status_code == guarded.get("/livez").status_code == 200


def test_the_client_has_the_key_or_is_told(guarded: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=1)
    with Client(guarded.url) as client, pytest.raises(ConfigError, match="wants an API key"):
        client.generate("Hello", params, use_tqdm=False)
    with Client(guarded.url, api_key=KEY) as client:
        assert client.generate("Hello", params, use_tqdm=False)[0].finished
    monkeypatch.setenv("DISTKV_API_KEY", KEY)
    with Client(guarded.url) as client:
        assert client.stats().num_running == 0


def test_large_bodies_are_refused(guarded: ServerProcess) -> None:
    body = {"prompt": "a" * 3000}
    refused = guarded.post("/v1/completions", body, headers=BEARER)
    assert refused.status_code == 413 and "--max-body-bytes" in refused.json()["error"]["message"]

    def parts() -> Iterator[bytes]:  # of a body that does not say how long it is
        for _ in range(3):
            yield b" " * 1000

    headers = BEARER | {"content-type": "application/json"}
    refused = httpx2.post(f"{guarded.url}/v1/completions", content=parts(), headers=headers, timeout=60)
    assert refused.status_code == 413


def test_more_prompts_than_have_a_place_are_refused(guarded: ServerProcess) -> None:
    for prompt in (["a", "b"], [[40], [41]]):
        refused = guarded.post("/v1/completions", {"prompt": prompt, "max_tokens": 1}, headers=BEARER)
        assert refused.status_code == 400 and "several requests" in refused.json()["error"]["message"]


def test_a_full_queue_is_told(guarded: ServerProcess) -> None:
    with httpx2.stream("POST", f"{guarded.url}/v1/completions", json=LONG, headers=BEARER, timeout=60) as first:
        parts = first.iter_raw()
        assert next(parts)
        refused = guarded.post("/v1/completions", {"prompt": "a"}, headers=BEARER)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with Client(guarded.url, api_key=KEY) as client, pytest.raises(QueueFull, match="--max-queued-requests"):
            client.generate("a", use_tqdm=False)
        [line] = [
            one
            for one in guarded.get("/metrics", headers=BEARER).text.splitlines()
            if one.startswith("distkv:requests_refused_total{")
        ]
        assert line.endswith(" 2.0"), line
    guarded.await_idle(KEY)
    allowed = guarded.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=BEARER)
    assert allowed.status_code == 200


def test_listening_everywhere_without_a_key_is_warned_of(guarded: ServerProcess, talker: Path) -> None:
    assert "without an API key" not in guarded.log
    command = [sys.executable, "-m", "distkv", "serve", str(talker), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert "listens on 0.0.0.0 without an API key" in process.stderr.readline()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0, "SIGTERM ends one that is loading"


def test_a_taken_port_is_told_before_the_model_is_loaded(talker: Path, run_here: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_here("serve", str(talker), "--port", str(port))
    assert result.returncode == 2 and f"port {port}, cannot be listened on" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distkv", "serve", str(tmp_path), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "config.json" in result.stderr and len(result.stderr.splitlines()) == 1


def test_ids_come_back(server: ServerProcess) -> None:
    body = {"prompt": "Hello", "max_tokens": 1}
    answer = server.post("/v1/completions", body, headers={"x-request-id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7" and answer.json()["id"] == "cmpl-mine-7"
    assert re.fullmatch("[0-9a-f]{32}", server.get("/health").headers["x-request-id"])
    assert server.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_what_it_says_of_itself(server: ServerProcess) -> None:
    assert server.get("/version").json() == {"version": __version__}
    tokens = server.post("/tokenize", {"prompt": "Hello", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) and "".join(tokens["token_strs"]) == "Hello"
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hello"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}).json()
    assert server.post("/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": "user: Hello</s>assistant: "}
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and "message['role']" in info["chat_template"]
    assert "/v1/chat/completions" in server.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens", "/v1/chat/completions"])
@pytest.mark.parametrize("token_ids", [["a"], [-5], [10**30], [[1]], [True]])
def test_tokens_of_messages_are_checked(server: ServerProcess, path: str, token_ids: list[Any]) -> None:
    answer = {"role": "assistant", "content": "Hello", "token_ids": token_ids}
    refused = server.post(path, {"messages": [answer, {"role": "user", "content": "and?"}]})
    assert refused.status_code == 400 and "integer" in refused.text


@pytest.mark.slow
def test_a_second_signal_ends_at_once(talker: Path) -> None:
    with (
        ServerProcess(talker, "--device-kv-bytes", "4MiB") as server,
        httpx2.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as stream,
    ):
        parts = stream.iter_bytes()
        said = next(parts)
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        with contextlib.suppress(httpx2.TransportError):
            said += b"".join(parts)
        assert server.process.wait(60) == 130 and b'"finish_reason":"length"' not in said
        assert "Traceback" not in server.log


@pytest.mark.slow
def test_the_demo_model_knows_paris(demo_model: Path) -> None:
    with (
        ServerProcess(demo_model, "--served-model-name", "smollm2", "--device-kv-bytes", "256MiB") as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client,
    ):
        question: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        common: dict[str, Any] = {"model": "smollm2", "messages": question, "temperature": 0, "max_tokens": 20}
        answer = client.chat.completions.create(**common)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(**common, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer.choices[0].message.content


def test_a_page_of_another_site_cannot_ask(server: ServerProcess) -> None:
    """Which may send texts and forms, but not JSON."""
    for path in ("/v1/completions", "/generate", "/reset_prefix_cache"):
        answer = httpx2.post(
            server.url + path, content=b'{"prompt": "Hello"}', headers={"content-type": "text/plain"}, timeout=60
        )
        assert answer.status_code == 400 and "content-type: application/json" in answer.text


def test_sigterm_lets_what_runs_end(guarded: ServerProcess) -> None:
    """The last test of this server."""
    body = LONG | {"max_tokens": 300}
    with httpx2.stream("POST", f"{guarded.url}/v1/completions", json=body, headers=BEARER, timeout=60) as stream:
        parts = stream.iter_bytes()
        whole = next(parts)
        guarded.process.send_signal(signal.SIGTERM)
        whole += b"".join(parts)
    assert whole.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in whole
    assert guarded.process.wait(60) == 0
    assert "Traceback" not in guarded.log


@pytest.mark.parametrize(
    "options, message",
    [
        ({"port": 70000}, "port is 70000"),
        ({"host": ""}, "host is ''"),
        ({"api_key": " "}, "the API key is empty"),
        ({"served_model_name": [""]}, "names that are not empty"),
        ({"max_body_bytes": "many"}, "max_body_bytes is 'many'"),
        ({"shutdown_timeout": 0}, "shutdown_timeout is 0"),
        ({"uvicorn_log_level": "loud"}, "uvicorn_log_level is 'loud'"),
    ],
)
def test_bad_options_name_the_cure(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerOptions(**options)


def test_a_key_is_in_no_repr() -> None:
    assert KEY not in repr(ServerOptions(api_key=KEY))
