"""SIGTERM: what runs ends or is ended, what comes is refused, and the next process goes on from what was saved."""

import io
import json
import os
import signal
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.servers import ServerProcess

from distkv import LLM, AsyncLLM, Client, Draining, SamplingParams
from distkv.cache_folders.export_store import PIECE_BYTES, Put
from distkv.frontend.session import Session
from distkv.server import serve
from distkv.server.options import ServerOptions
from distkv.server.serve import _Server
from distkv.server.service import Service

PAGE_SIZE = 16
SIZES: dict[str, Any] = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "16MiB")
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "stream": True, "temperature": 0}
QUESTION = [{"role": "user", "content": "Tell me all that you know of the tiers of a cache, one after the other."}]


def test_a_server_that_is_told_to_end(talker: Path, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    flags += ["--page-size", str(PAGE_SIZE), "--cache-dir", str(tmp_path), "--num-threads", "1"]
    with ServerProcess(talker, *flags, "--disk-write-policy", "idle") as server, ExitStack() as stack:

        def begin(path: str, body: dict[str, Any]) -> Any:
            stream = httpx2.stream("POST", server.url + path, json=LONG | body, timeout=60)
            parts = stack.enter_context(stream).iter_bytes()
            return next(parts), parts

        streams = [
            begin("/v1/completions", {"prompt": "Hello", "n": 4}),
            begin("/v1/chat/completions", {"messages": QUESTION, "session": "tiers"}),
        ]
        server.process.send_signal(signal.SIGTERM)
        while (health := server.get("/health")).status_code == 200:
            """The signal is on its way."""
        refused = server.post("/v1/completions", {"prompt": "Hello"})
        for response in (health, refused):
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["code"] == "Draining"
        with Client(server.url) as client, pytest.raises(Draining, match="takes no more requests"):
            client.generate("Hello", use_tqdm=False)
        server.process.send_signal(signal.SIGTERM)
        said = [first + b"".join(parts) for first, parts in streams]
        assert server.process.wait() == 0
        assert "Traceback" not in server.log and "2 requests are ended before they are done" in server.log
    for text in said:
        *events, error, done = [one.removeprefix(b"data: ") for one in text.split(b"\n\n") if one]
        assert done == b"[DONE]" and json.loads(error)["error"]["code"] == "Draining"
    answer = "".join(json.loads(one)["choices"][0]["delta"].get("content") or "" for one in events)

    with Session(tmp_path, "tiers") as session:
        kept = session.messages
    assert [one["role"] for one in kept] == ["user", "assistant"] and kept[1]["content"] == answer
    with LLM(talker, page_size=PAGE_SIZE, cache_dir=tmp_path, **SIZES) as llm:
        more = [{"role": "user", "content": "And more?"}]
        [output] = llm.chat(more, SamplingParams(max_tokens=1), session="tiers", use_tqdm=False)
        so_far = len(llm.tokenizer.encode_chat(kept[:1])) + len(kept[1]["token_ids"])
        assert so_far > 2 * PAGE_SIZE and output.num_cached_tokens >= so_far - so_far % PAGE_SIZE


def test_a_second_signal_does_not_wait_for_clients_that_take_nothing() -> None:
    """Their answers have ended then, as far as the engine goes."""
    server = _Server(Service(["talker"], ServerOptions()), None)
    with server.handling_signals():
        signal.raise_signal(signal.SIGTERM)
        assert server.should_exit and not server.force_exit
        signal.raise_signal(signal.SIGTERM)
        assert server.force_exit


def test_an_export_that_is_under_way_is_sent_to_its_end(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the time that all has which runs, and no other begins meanwhile."""
    goes_on = threading.Event()
    member = os.urandom(2 * PIECE_BYTES)

    def export_to(self: AsyncLLM, store: AbstractContextManager[Put], *_: Any, **__: Any) -> None:
        with store as put:
            put("first", member)
            assert goes_on.wait(60)
            put("last", member)

    def export(url: str) -> tuple[bytes, int]:
        """The file, and the status of who asks for one after the signal."""
        options: dict[str, Any] = {"json": {"all": True}, "headers": {"x-api-key": "k"}, "timeout": 60}
        with httpx2.stream("POST", f"{url}/cache/export", **options) as answer:
            parts: Iterator[bytes] = answer.iter_bytes()
            first = next(parts)
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                while httpx2.get(f"{url}/health", timeout=60).status_code == 200:
                    """The signal is on its way."""
                refused = httpx2.post(f"{url}/cache/export", **options)
            finally:
                goes_on.set()
            return first + b"".join(parts), refused.status_code

    monkeypatch.setattr(AsyncLLM, "export_to", export_to)
    monkeypatch.setattr(serve, "SEND_SECONDS", 0)
    exported: list[Future[tuple[bytes, int]]] = []
    options = ServerOptions(port=0, api_key="k", cache_transfer_bytes="1MiB", shutdown_timeout=60)
    with ThreadPoolExecutor(1) as threads:
        serve.serve(
            "talker", lambda: talker, options, {"device_kv_bytes": "8MiB", "num_threads": 1},
            lambda *_: None, lambda url: exported.append(threads.submit(export, url)),
        )  # fmt: skip
        content, refused = exported[0].result()
    assert refused == 503
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert [file.read(name) for name in file.namelist()] == [member, member]
