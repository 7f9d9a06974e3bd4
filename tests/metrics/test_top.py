"""`distkv top` shows what a server does, ends by Ctrl-C, and says in a line what is wrong with an address."""

import io
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from support.llms import tiered
from support.processes import ROOT
from support.prompts import random_prompt

from distkv import LLM, ConfigError, SamplingParams
from distkv.commands.main import main
from distkv.metrics.exposition import CONTENT_TYPE, exposition
from distkv.metrics.reading import Interval, Reading, metrics_url, read
from distkv.metrics.top import _line, _picture

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
KEY = "secret"


@dataclass
class Server:
    """A web server of this process; `answer` is what the next GET gets."""

    url: str
    answer: Callable[[BaseHTTPRequestHandler], bytes | int]


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with tiered(tiny_model, (10, 7, 60), tmp_path_factory.mktemp("cache")) as llm:
        yield llm


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    def page(handler: BaseHTTPRequestHandler) -> bytes:
        assert handler.path == "/metrics"
        return exposition(llm.stats(), llm.info, "a model")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = made.answer(self)
            self.send_response(200 if isinstance(body, bytes) else body)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else b"no")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        made = Server(f"http://127.0.0.1:{serving.server_port}", page)
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield made
        serving.shutdown()
        thread.join()


def ask(llm: LLM) -> None:
    llm.generate([random_prompt(200, 2), random_prompt(180, 3)], PARAMS, use_tqdm=False)


def test_what_has_happened_between_two_readings(llm: LLM, server: Server) -> None:
    first = replace(read(metrics_url(server.url), None), seconds=10.0)
    before = llm.stats()
    ask(llm)
    after = llm.stats()
    last = replace(read(metrics_url(server.url), None), seconds=12.0)
    interval = Interval(first, last)
    assert interval.rate("generation_tokens_total") == 30
    assert interval.rise("request_success_total", finished_reason="length") == 2
    streamed = after.bytes_moved["disk_streamed"] - before.bytes_moved.get("disk_streamed", 0)
    assert interval.rate("transfer_bytes_total", **{"from": "disk", "to": "staging"}) == streamed / 2
    middle, high = (interval.quantile("inter_token_latency_seconds", share) for share in (0.5, 0.95))
    assert middle is not None and high is not None and 0 < middle <= high
    assert Interval(last, last).quantile("inter_token_latency_seconds", 0.5) is None
    line = _line(interval, interval)
    assert "0 running, 0 waiting; tokens/s 30.0 out, 190.0 in; TTFT " in line
    assert "/0.08 MiB" in line and "disk " in line and "MB/s in" in line


def test_quantiles_are_prometheus_own() -> None:
    def reading(*counts: int) -> Reading:
        bounds = zip(("0.1", "0.2", "0.4", "+Inf"), counts, strict=True)
        return Reading({("x_bucket", frozenset({("le", bound)})): count for bound, count in bounds})

    interval = Interval(reading(1, 1, 1, 1), reading(3, 7, 9, 11))
    assert interval.quantile("x", 0.2) == pytest.approx(0.1)
    assert interval.quantile("x", 0.5) == pytest.approx(0.175)
    assert interval.quantile("x", 0.95) == 0.4, "nobody knows how far above"
    assert Interval(reading(5, 5, 5, 5), reading(1, 1, 1, 1)).quantile("x", 0.5) == 0.05, "the server has begun again"


def test_the_picture_has_a_bar_for_each_tier(llm: LLM, server: Server) -> None:
    before = read(metrics_url(server.url), None)
    ask(llm)
    interval = Interval(before, read(metrics_url(server.url), None))
    console = Console(file=io.StringIO(), width=110)
    console.print(_picture("http://here", interval, interval))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a model at http://here" in text and "p95" in text
    for tier in ("device", "host", "disk"):
        [line] = [line for line in text.splitlines() if line.startswith(tier)]
        assert sum(map(line.count, "█▒·")) == 32 and "▒" in line, "pages of ended requests are kept"


def test_the_command_in_a_terminal_ends_by_ctrl_c(llm: LLM, server: Server) -> None:
    ask(llm)
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "distkv", "top", server.url], cwd=ROOT, stdin=theirs, stdout=theirs,
        stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm", "COLUMNS": "110"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"Ctrl-C ends this" not in shown:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # what Linux has for the end of a terminal
        pass
    os.close(terminal)
    assert process.communicate()[1] == b"" and process.returncode == 0
    assert "a model at" in shown.decode() and "▒" in shown.decode()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which fails; returns its one line."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["distkv", "top", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        [line] = capfd.readouterr().err.splitlines()
        assert end.value.code == 2
        return line

    return run


def test_an_address_where_nothing_answers(refused: Callable[..., str], server: Server) -> None:
    assert "nothing answers at http://127.0.0.1:1/metrics (" in refused("127.0.0.1:1")
    assert "does `distkv serve` run there?" in refused("http://no.such.host.invalid/")
    for nonsense in ("file:///etc/passwd", "http://", "http://host:port", "http://a b", "", "\n", "ftp://host"):
        assert "no address of a server; give one such as" in refused(nonsense)
    server.answer = lambda _: b"\xff\x00 <html>"
    assert "has no metrics of distkv" in refused(server.url)
    server.answer = lambda _: b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1.0\n"
    assert "has no metrics of distkv" in refused(server.url)
    server.answer = lambda _: 404
    assert "answers 404 Not Found" in refused(server.url)


def test_a_server_with_a_key(
    llm: LLM, server: Server, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    def guarded(handler: BaseHTTPRequestHandler) -> bytes | int:
        keys.append(handler.headers["Authorization"])
        return exposition(llm.stats(), llm.info, "a model") if keys[-1] == f"Bearer {KEY}" else 401

    server.answer = guarded
    assert "wants an API key; give it with --api-key or DISTKV_API_KEY" in refused(server.url)
    assert "wants an API key" in refused(server.url, "--api-key", "wrong")
    assert keys == [None, "Bearer wrong"]
    assert read(metrics_url(server.url), KEY).samples


def test_a_server_that_goes_away_is_an_error(server: Server, refused: Callable[..., str], llm: LLM) -> None:
    answers = iter([exposition(llm.stats(), llm.info, "a model")])
    server.answer = lambda _: next(answers, 503)
    assert "answers 503 Service Unavailable" in refused(server.url)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("https://host/prefix/", "https://host/prefix/metrics"),
        ("http://[::1]:8000/metrics", "http://[::1]:8000/metrics"),
    ],
)
def test_addresses(given: str, expected: str) -> None:
    assert metrics_url(given) == expected
    with pytest.raises(ConfigError):
        metrics_url(given.replace(":", "::::", 1))
