"""How many connections a server takes, and for how long."""

import asyncio
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from support.servers import ServerProcess

from distkv.client.calls import settings
from distkv.errors import ConfigError
from distkv.server import accepting, http_connection
from distkv.server.http_server import HttpServer
from distkv.server.listening import listen
from distkv.server.options import ServerOptions

REQUEST = b"GET /%d HTTP/1.1\r\nhost: here\r\n\r\n"
UPLOAD = b"POST /0 HTTP/1.1\r\nhost: here\r\ncontent-length: 10\r\n\r\n"
CHUNKED = b"POST /0 HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n"
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


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Waits for no body."""
    await Response(status_code=401)(scope, receive, send)


class Waiter:
    """Answers nobody, and counts the clients that have asked and those that have gone."""

    def __init__(self) -> None:
        self.asked, self.gone = threading.Semaphore(0), threading.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Waits until its client goes."""
        self.asked.release()
        while (await receive())["type"] != "http.disconnect":
            """The body."""
        self.gone.release()


@contextmanager
def serving(app: ASGIApp) -> Iterator[tuple[HttpServer, tuple[str, int]]]:
    """A server, and its address."""
    with closing(listen("127.0.0.1", 0)) as listener:
        running = HttpServer(app, ServerOptions())
        thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listener])))
        thread.start()
        try:
            yield running, listener.getsockname()
        finally:
            running.should_exit = running.force_exit = True
            thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "SILENCE_SECONDS", SILENCE)


@pytest.fixture
def address(impatient: None) -> Iterator[tuple[str, int]]:
    """Of a server of `answer` that has little patience."""
    with serving(answer) as (_, address):
        yield address


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


@pytest.mark.parametrize("begun", [b"GET /0 HTTP/1.1\r\n", CHUNKED + b"0\r\n", CHUNKED + b"5;"])
@pytest.mark.parametrize("endless", [b"a: b\r\n" * 100_000, b"a" * 600_000])
def test_headers_without_end(begun: bytes, endless: bytes) -> None:
    """Those of a request, those behind its body, and what stands beside the size of a part of it."""
    with serving(answer) as (_, address), socket.create_connection(address, timeout=20) as connection:
        with suppress(OSError):
            connection.sendall(begun + endless)
        assert said(connection)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"")


def test_headers_without_end_behind_a_request_that_takes_long() -> None:
    """Its answer might have begun, so none stands for the headers."""
    waiter = Waiter()
    with serving(waiter) as (_, address), socket.create_connection(address, timeout=20) as connection:
        connection.sendall(REQUEST % 0)
        assert waiter.asked.acquire(timeout=20)
        with suppress(OSError):
            connection.sendall(b"GET /0 HTTP/1.1\r\na: " + b"a" * 2_000_000)
        assert said(connection) == b"" and waiter.gone.acquire(timeout=20)


def test_a_body_that_comes_after_the_answer(impatient: None) -> None:
    """The connection is closed after it."""
    with serving(refuse) as (_, address), socket.create_connection(address, timeout=20) as connection:
        connection.sendall(UPLOAD)
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        with suppress(OSError):
            connection.sendall(bytes(10))
        assert said(connection) == b""


def test_headers_without_end_behind_a_body_that_comes_after_the_answer() -> None:
    with serving(refuse) as (_, address), socket.create_connection(address, timeout=20) as connection:
        connection.sendall(UPLOAD)
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        with suppress(OSError):
            connection.sendall(bytes(10) + b"GET /0 HTTP/1.1\r\na: " + b"a" * 600_000)
        assert said(connection)[:12] in (b"HTTP/1.1 431", b"")


def test_what_is_no_request_behind_one_that_takes_long() -> None:
    """Its answer might have begun, so none stands for the other."""
    waiter = Waiter()
    with serving(waiter) as (_, address), socket.create_connection(address, timeout=20) as connection:
        connection.sendall(REQUEST % 0)
        assert waiter.asked.acquire(timeout=20)
        connection.sendall(b"GARBAGE\r\n\r\n")
        assert said(connection) == b"" and waiter.gone.acquire(timeout=20)


def test_who_has_just_been_answered_does_not_make_way() -> None:
    """Its silence begins with the end of the answer."""
    closed = []

    async def answer_late(scope: Scope, receive: Receive, send: Send) -> None:
        loop, [connection] = asyncio.get_running_loop(), running.server_state.connections
        now, seconds = loop.time, 0

        def wait() -> None:
            nonlocal seconds
            seconds += 20

        def ask() -> None:
            connection.give_way(10)
            closed.append(connection.transport.is_closing())

        loop.time = lambda: now() + seconds  # type: ignore[method-assign]
        wait()
        ask()
        await Response("done")(scope, receive, send)
        ask()
        wait()
        ask()

    with serving(answer_late) as (running, address), socket.create_connection(address, timeout=20) as connection:
        connection.sendall(REQUEST % 0)
        assert said(connection).endswith(b"done")
    assert closed == [False, False, True]


def test_a_client_that_has_asked_twice_and_goes() -> None:
    """The request that is being answered is told, not just the one that waits behind it."""
    waiter = Waiter()
    with serving(waiter) as (_, address):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(REQUEST % 0 + REQUEST % 1)
            assert waiter.asked.acquire(timeout=20)
        assert waiter.gone.acquire(timeout=20)


def test_who_asks_again_before_its_connection_is_given_up() -> None:
    """Clients give it up first, or some would send a request into one that is being closed."""
    kept = HttpServer(answer, ServerOptions()).config.timeout_keep_alive
    assert settings("http://here", None)["limits"].keepalive_expiry * 2 < kept == http_connection.SILENCE_SECONDS


def test_answers_that_take_long_and_large_bodies(address: tuple[str, int]) -> None:
    """Neither is a silence, and one begins when an answer has ended."""
    with socket.create_connection(address, timeout=20) as connection:
        body = bytes(3 * http_connection.MOST_HEAD_BYTES)
        for tenths, rest in ((28, 0.4), (0, 0.0), (20, 0.0)):
            connection.sendall(b"POST /%d HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n" % (tenths, len(body)))
            connection.sendall(body)
            head = b""
            while not head.endswith(b"%d" % len(body)):
                part = connection.recv(65536)
                assert part, "it was closed"
                head += part
            assert head.startswith(b"HTTP/1.1 200")
            time.sleep(rest)
