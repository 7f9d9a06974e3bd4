"""How many connections a server takes, and for how long."""

import asyncio
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from support.servers import ServerProcess

from distkv.errors import ConfigError
from distkv.server import accepting, http_connection
from distkv.server.http_server import HttpServer
from distkv.server.listening import listen
from distkv.server.options import ServerOptions

REQUEST = b"GET /%d HTTP/1.1\r\nhost: here\r\n\r\n"
SILENCE = 1.5  # seconds: longer than a busy machine leaves this process without a core


def test_more_connections_than_files(server: ServerProcess) -> None:
    """Silent ones make way, and all who ask are answered in the end."""
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    num_open = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    address = server.url.removeprefix("http://").split(":")

    async def ask() -> Counter[int]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, headers={"connection": "close"}) as client:
            body = {"prompt": "Hello", "max_tokens": 2}
            return Counter(
                answer.status_code
                for answer in await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(16)))
            )

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_open * 8 // 5 + 16, before[1]))
    silent = [socket.create_connection((address[0], int(address[1]))) for _ in range(16)]
    try:
        assert asyncio.run(ask()) == {200: 16}
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for one in silent:
            one.close()
    assert "connections wait: no more than" in server.log and "Traceback" not in server.log


def test_a_limit_of_too_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting.resource, "getrlimit", lambda _: (16, 30))
    with pytest.raises(ConfigError, match="30 files may be open, and a server needs 40"):
        HttpServer(answer, ServerOptions())


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Takes as many seconds as the path has tenths, and says how many bytes the body has."""
    request = Request(scope, receive)
    await asyncio.sleep(int(scope["path"][1:]) / 10)
    await Response(str(len(await request.body())))(scope, receive, send)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Of a server of `answer` that has little patience."""
    monkeypatch.setattr(http_connection, "SILENCE_SECONDS", SILENCE)
    with closing(listen("127.0.0.1", 0)) as listener:
        running = HttpServer(answer, ServerOptions())
        thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listener])))
        thread.start()
        yield listener.getsockname()
        running.should_exit = True
        thread.join()


def said(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    parts = []
    with suppress(ConnectionResetError):  # there was more to read for it
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("begun", [b"", b"G", REQUEST[:-2] % 0, REQUEST % 0 + b"GET"])
def test_a_request_that_does_not_come(address: tuple[str, int], begun: bytes) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(begun)
        assert said(connection).count(b"200 OK") == (begun.endswith(b"GET"))


def test_headers_that_come_bit_by_bit(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /0 HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
            for _ in range(10_000):
                connection.sendall(b"a: b\r\n")
                time.sleep(0.05)


@pytest.mark.parametrize("endless", [b"a: b\r\n" * 100_000, b"a" * 600_000])
def test_headers_without_end(address: tuple[str, int], endless: bytes) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        with suppress(OSError):
            connection.sendall(b"GET /0 HTTP/1.1\r\n" + endless)
        assert said(connection)[:12] in (b"HTTP/1.1 431", b"")


def test_answers_that_take_long_and_large_bodies(address: tuple[str, int]) -> None:
    """Neither is a silence, and one begins when an answer has ended."""
    with socket.create_connection(address, timeout=20) as connection:
        body = bytes(3 * http_connection.MOST_HEAD_BYTES)
        for tenths, rest in ((28, 0.4), (0, 0.0), (20, 0.0)):  # the server looks after 15 and 30
            connection.sendall(b"POST /%d HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n" % (tenths, len(body)))
            connection.sendall(body)
            head = b""
            while not head.endswith(b"%d" % len(body)):
                part = connection.recv(65536)
                assert part, "it was closed"
                head += part
            assert head.startswith(b"HTTP/1.1 200")
            time.sleep(rest)
