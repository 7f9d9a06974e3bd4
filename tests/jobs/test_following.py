"""A job's log over connections that break, in the ways in which networks break them."""

import asyncio
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from distkv import ConfigError
from distkv.jobs import cluster as clusters
from distkv.jobs import following
from distkv.jobs.cluster import Cluster
from distkv.jobs.following import follow

LOG = ["one\n", "two\n", "three\n"]


class Client:
    """In the place of Ray's: a log that takes as many connections as there are `cuts`, and one more."""

    def __init__(self, *cuts: Any, away_for: int = 0, error: Exception | None = None):
        """`away_for` requests after a cut fail with `error`."""
        self.cuts, self.away_for, self.num_away, self.num_asked = list(cuts), away_for, 0, 0
        self.error = error or ConnectionError("away")
        self.is_ended = False

    def _answer(self) -> None:
        if self.num_away:
            self.num_away -= 1
            raise self.error

    def get_job_info(self, job: str) -> Any:
        self.num_asked += 1
        self._answer()
        if job != "mine":
            raise RuntimeError(f"Job {job} does not exist")
        return SimpleNamespace(status=JobStatus.SUCCEEDED if self.is_ended else JobStatus.RUNNING)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self._answer()
        yield LOG[0]
        cut = self.cuts.pop(0) if self.cuts else None
        if isinstance(cut, Exception):
            self.num_away = self.away_for
            raise cut
        if cut == "interrupt":
            asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGINT)
            await asyncio.Event().wait()
        self.is_ended = True
        if cut == "silent":
            await asyncio.Event().wait()
        yield LOG[1]
        yield LOG[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "LOG_SECONDS", 0.01)
    monkeypatch.setattr(following, "STATUS_SECONDS", 0.0)


def cluster_of(client: Client) -> Cluster:
    cluster = Cluster.__new__(Cluster)
    cluster.address, cluster._client = "http://there", client  # type: ignore[assignment]
    return cluster


@pytest.mark.parametrize(
    "cuts", [(RuntimeError("closed"),), (ConnectionResetError(),), ("silent",), (RuntimeError(), "silent", "silent")]
)
def test_each_character_of_a_log_is_printed_once(cuts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    details = follow(cluster_of(Client(*cuts)), "mine", print)
    assert details.status == JobStatus.SUCCEEDED and capsys.readouterr().out == "".join(LOG)


@pytest.mark.parametrize("error", [None, RuntimeError("Request failed with status code 503: soon")])
def test_a_dashboard_that_is_started_anew_is_waited_for(
    error: Exception | None, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(cluster_of(Client(RuntimeError("closed"), away_for=30, error=error)), "mine", print)
    assert capsys.readouterr().out == "".join(LOG)


def test_ctrl_c_ends_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        follow(cluster_of(Client("interrupt")), "mine", print)


def test_a_dashboard_that_stays_away_is_told_with_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "AWAY_SECONDS", 0.0)
    client = Client(RuntimeError(), away_for=10**6)
    with pytest.raises(ConfigError, match="submit --address http://there --follow mine"):
        follow(cluster_of(client), "mine", print)


def test_a_job_that_there_is_not_is_told_at_once() -> None:
    client = Client()
    with pytest.raises(ConfigError, match="does not exist"):
        follow(cluster_of(client), "other", print)
    assert client.num_asked == 1


def test_an_output_that_is_closed_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(following.sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    with pytest.raises(BrokenPipeError):
        follow(cluster_of(Client()), "mine", print)
