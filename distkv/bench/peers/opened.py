"""Engines that are loaded and wait for work, as a driver or as a server."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from distkv.bench.peers.engines import HOST, Engine, Setting
from distkv.bench.peers.guarded import GuardedProcess, PeerFailed
from distkv.bench.peers.http_load import is_ready, load
from distkv.bench.peers.workloads import Work

PROBE_LIMIT = 30.0  # seconds
POLL = 0.2  # seconds


class Opened(Protocol):
    """A loaded engine."""

    start_s: float
    """Seconds that loading took."""
    group: int
    """The group of its processes."""

    def turn(self, work: Work, time_limit: float) -> dict[str, float]:
        """Does the work within seconds; returns figures by their names. Raises PeerFailed."""


def probe(engine: Engine, setting: Setting, log: Path) -> dict[str, Any]:
    """Versions of a peer. Raises PeerFailed when its Python or its engine is missing."""
    with GuardedProcess(engine.probe_command(), engine.environment(setting), log) as process:
        return process.read(PROBE_LIMIT)


@contextmanager
def driver(engine: Engine, setting: Setting, log: Path, time_limit: float) -> Iterator[Opened]:
    """The engine in its driver. Raises PeerFailed."""
    with GuardedProcess(engine.driver_command(setting), engine.environment(setting), log) as process:
        with _understanding():
            start_s = float(process.read(time_limit)["start_s"])
        yield _Driver(process, start_s)


class _Driver:
    def __init__(self, process: GuardedProcess, start_s: float):
        self._process, self.start_s, self.group = process, start_s, process.group

    def turn(self, work: Work, time_limit: float) -> dict[str, float]:
        """One request alone gives the rate of its prefill and the time of a token, many give their throughput."""
        answer = self._process.ask({"prompts": work.prompts, "new_tokens": work.new_tokens}, time_limit)
        with _understanding():
            counts = [len(tokens) for tokens in answer["tokens"]]
            if counts != work.new_tokens:
                raise PeerFailed(f"it answered with {counts} tokens instead of {work.new_tokens}")
            if work.part != "single":
                return {"output_tokens_per_s": sum(counts) / answer["seconds"]}
            return {
                "prefill_tokens_per_s": len(work.prompts[0]) / answer["first_s"],
                "decode_ms_per_token": 1e3 * (answer["seconds"] - answer["first_s"]) / (counts[0] - 1),
            }


@contextmanager
def _understanding() -> Iterator[None]:
    """Makes a PeerFailed of an answer that lacks something, or has something else in its place."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PeerFailed(f"its answer cannot be understood: {type(error).__name__}: {error}") from error


@contextmanager
def server(engine: Engine, setting: Setting, log: Path, time_limit: float) -> Iterator[Opened]:
    """The engine behind its own HTTP server, once that answers. Raises PeerFailed."""
    start = time.monotonic()
    port = _free_port()
    url = f"http://{HOST}:{port}"
    command, environment = engine.server_command(setting, port), engine.environment(setting)
    with GuardedProcess(command, environment, log, is_talking=False) as process:
        while not is_ready(url):
            process.check_alive()
            if time.monotonic() > start + time_limit:
                raise PeerFailed(f"its server did not answer within {time_limit:g} s, the time limit")
            time.sleep(POLL)
        yield _Server(url, process, time.monotonic() - start)


class _Server:
    def __init__(self, url: str, process: GuardedProcess, start_s: float):
        self._url, self._process, self.start_s, self.group = url, process, start_s, process.group

    def turn(self, work: Work, time_limit: float) -> dict[str, float]:
        """As many streams at a time as the work says, each of which takes the next request when one has ended."""
        try:
            return load(self._url, work, time_limit)
        except PeerFailed:
            self._process.check_alive()
            raise


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
