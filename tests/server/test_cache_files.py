"""What one server has read another one takes in, over HTTP; nobody without the key, nothing damaged."""

import asyncio
import gc
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.servers import ServerProcess

from distkv import ConfigError
from distkv.server.cache_files import _pieces
from distkv.server.options import ServerOptions

KEY = "a-secret"
FLAGS = (
    "--page-size", "16", "--device-kv-bytes", "8MiB", "--host-kv-bytes", "4MiB", "--disk-kv-bytes", "4MiB",
    "--num-threads", "1", "--cache-transfer-bytes", "2MB",
)  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def url(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    environment = os.environ | {"DISTKV_API_KEY": KEY}
    cache_dir = tmp_path_factory.mktemp("cache")
    with ServerProcess(talker, *FLAGS, "--cache-dir", str(cache_dir), env=environment) as server:
        yield server.url
        assert not list(cache_dir.glob(".import-*")), "an upload has not been removed"
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def client(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def ask(client: httpx2.Client, salt: str | None = None) -> tuple[str, int]:
    """The answer to TEXT, and how many tokens of it were cached."""
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "cache_salt": salt}
    found = client.post("/v1/completions", json=body).json()
    details = found["usage"]["prompt_tokens_details"]
    return found["choices"][0]["text"], details["cached_tokens"] if details else 0


def send(client: httpx2.Client, content: bytes, **salt: str) -> httpx2.Response:
    return client.post("/cache/import", content=content, headers={"content-type": "application/zip"}, params=salt)


def message(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["message"])


def test_a_book_goes_out_and_comes_in(client: httpx2.Client) -> None:
    """Under another salt, which stands for another server of the same model."""
    text, _ = ask(client)
    answer = client.post("/cache/export", json={"prompts": [TEXT]})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/zip"
    assert zipfile.ZipFile(io.BytesIO(answer.content)).testzip() is None
    assert ask(client, "other")[1] == 0
    num_pages = len(TEXT) // 16  # a token is a byte
    assert send(client, answer.content, cache_salt="mine").json() == {"num_pages": num_pages, "num_new": num_pages}
    again, cached = ask(client, "mine")
    assert again == text and cached == num_pages * 16 - (16 if len(TEXT) % 16 == 0 else 0)


def test_what_is_damaged_too_large_or_no_zip_is_refused(client: httpx2.Client) -> None:
    ask(client)
    content = client.post("/cache/export", json={"all": True}).content
    cut = send(client, content[:-100], cache_salt="cut")
    assert cut.status_code == 400 and message(cut).startswith("the file is no whole zip file")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damaged = send(client, bytes(flipped), cache_salt="cut")
    assert damaged.status_code == 400 and "damaged" in message(damaged)
    assert ask(client, "cut")[1] == 0
    large = send(client, bytes(2_000_001))
    assert large.status_code == 413 and "--cache-transfer-bytes" in message(large)
    assert client.post("/cache/import", json={}).status_code == 400
    nothing = client.post("/cache/export", json={"prompts": ["never read, and no page long"]})
    assert nothing.status_code == 400 and "no page of that" in message(nothing)
    assert client.post("/cache/export", json={"path": "/etc/passwd"}).status_code == 400


def test_one_at_a_time_and_a_client_that_leaves(client: httpx2.Client, url: str) -> None:
    ask(client)
    body: dict[str, Any] = {"all": True}
    with client.stream("POST", "/cache/export", json=body) as answer:
        next(answer.iter_raw(1000))
    while (answer := client.post("/cache/export", json=body)).status_code == 429:
        """Until it has been noticed."""
    assert answer.status_code == 200 and zipfile.ZipFile(io.BytesIO(answer.content)).testzip() is None
    assert httpx2.post(f"{url}/cache/export", json=body, timeout=60).status_code == 401


@pytest.mark.parametrize("num_waiting", [0, 2])
def test_a_client_that_leaves_puts_nothing_into_the_log(num_waiting: int) -> None:
    """Whether it waits for the thread that writes the file, or that waits for it to take a piece."""
    said: list[Any] = []
    goes_on = threading.Event()

    def work(write: Callable[[bytes], None]) -> None:
        for _ in range(1 + num_waiting):
            write(b"a piece")
        goes_on.wait(60)
        write(b"too late")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        has_come = asyncio.Event()

        async def take() -> None:
            async with aclosing(_pieces(work)) as pieces:
                async for _ in pieces:
                    has_come.set()
                    if num_waiting:
                        await asyncio.Event().wait()

        taking = asyncio.create_task(take())
        await has_come.wait()
        taking.cancel()
        goes_on.set()
        await asyncio.wait([taking])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        del taking
        gc.collect()

    asyncio.run(main())
    assert not said


def test_a_server_that_was_not_told_to(server: ServerProcess) -> None:
    for path in ("/cache/export", "/cache/import"):
        answer = httpx2.post(f"{server.url}{path}", json={}, headers={"content-type": "application/json"}, timeout=60)
        assert answer.status_code in (400, 403)
    refused = httpx2.post(f"{server.url}/cache/export", json={"all": True}, timeout=60)
    assert refused.status_code == 403 and "--cache-transfer-bytes" in message(refused)


def test_there_must_be_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTKV_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set one in DISTKV_API_KEY"):
        ServerOptions(cache_transfer_bytes="1GiB")
