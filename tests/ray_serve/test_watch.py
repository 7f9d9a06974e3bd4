"""What is said of an application whose replicas are missing or which does not answer, without Serve around it."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from distkv import CapacityError, DistKVError
from distkv.ray_serve import watch
from distkv.ray_serve.signals import Signals
from distkv.ray_serve.watch import LOOK_SECONDS, REMARK_SECONDS, Answers, Missing, Watch, failure

NO_ROOM = "Error:\nray::ServeReplica, in _place\n  raise\ndistkv.CapacityError: 2 CPUs were not free within 60 s"
SLOW = "Deployment 'engines' has 1 replicas that have taken more than 30s to initialize.\nThis may be caused by that"


def status(engines: int, starting: int = 0, message: str = "", of_all: str = "DEPLOYING") -> Any:
    """Serve's status, whose states are plain text as Serve has them."""
    states = {"RUNNING": engines, "STARTING": starting}
    return SimpleNamespace(
        status=ApplicationStatus(of_all), message="",
        deployments={
            "engines": SimpleNamespace(replica_states=states, message=message),
            "ingress": SimpleNamespace(replica_states={"RUNNING": 1}, message=""),
        },
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monotonic time, which passes in sleep alone."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)

    def sleep(self: Signals, seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(Signals, "sleep", sleep)
    return clock


def test_missing_replicas_are_told_after_a_while_and_when_that_changes(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    missing = Missing("app", {"engines": 2, "ingress": 1})
    told: list[str] = []

    def look(*state: Any) -> list[str]:
        caplog.clear()
        missing.look(status(*state))
        return caplog.messages

    assert look(0, 2) == []
    clock.now += REMARK_SECONDS - 1
    assert look(0, 2) == []
    clock.now += 1
    assert look(0, 2) == ["the application 'app' waits for replicas: 0 of 2 engines run, 2 starting"]
    assert look(0, 2) == look(0, 1, SLOW) == []  # nothing is known that was not before
    [told] = look(1, 1)
    assert "1 of 2 engines run, 1 starting" in told and "ingress" not in told
    [told] = look(1, 1, NO_ROOM)
    assert told.endswith("1 of 2 engines run, 1 starting (2 CPUs were not free within 60 s)")
    assert look(1, 1) == look(1, 0, SLOW) == look(1, 1, NO_ROOM) == []  # Serve tries again and again
    assert look(2) == ["the application 'app' has all its replicas now"]
    assert look(2) == look(1, 1) == []  # one that has died is given as long
    clock.now += REMARK_SECONDS
    assert len(look(1, 1)) == 1


def test_a_replica_that_starts_in_time_is_not_mentioned(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    missing = Missing("app", {"engines": 2, "ingress": 1})
    missing.look(status(1, 1))
    clock.now += REMARK_SECONDS
    missing.look(status(2))
    assert caplog.messages == []


def test_a_server_that_falls_silent_is_told_once_and_so_is_its_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = Answers("http://there")
    found = iter([None, "refused", None, "refused", "refused", "refused", None, None])
    monkeypatch.setattr(watch, "silence", lambda url: next(found))
    counts = []
    for _ in range(8):
        answers.look()
        counts.append(len(caplog.messages))
    assert counts == [0, 0, 0, 0, 1, 1, 2, 2], caplog.messages
    assert "http://there does not answer (refused)" in caplog.messages[0] and "again" in caplog.messages[1]


class Serve:
    """In the place of Serve: a status for each look, the last one for all that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: Any):
        self.left = list(found)
        monkeypatch.setattr(watch.serve, "status", self.status)

    def status(self) -> SimpleNamespace:
        found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return SimpleNamespace(applications={} if found is None else {"app": found})


def test_requests_are_answered_before_all_replicas_run(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    serve = Serve(monkeypatch, status(0, 2), status(0, 2), status(1, 1))
    monkeypatch.setattr(watch, "silence", lambda url: asked.append(url))
    assert Watch("app", "http://here", {"engines": 2, "ingress": 1}, Signals()).await_answer() == "http://here"
    assert len(serve.left) == 1 and asked == ["http://here"]  # not while nothing could answer


def test_an_application_that_is_gone_or_has_failed_ends_the_wait(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Watch("app", "http://here", {"engines": 2, "ingress": 1}, Signals())
    Serve(monkeypatch, status(0, 2), None)
    with pytest.raises(DistKVError, match="'app' was deleted"):
        waiting.await_answer()
    Serve(monkeypatch, status(0, 0, NO_ROOM, "DEPLOY_FAILED"))
    with pytest.raises(CapacityError, match=r"^2 CPUs were not free within 60 s$"):
        waiting.await_answer()


def test_staying_tells_what_is_not_the_end_of_the_start(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    runs, ill = status(2, of_all="RUNNING"), status(1, 1, of_all="UNHEALTHY")
    Serve(monkeypatch, status(1, 1), status(1, 1), runs, ill, ill, runs, None)
    monkeypatch.setattr(watch, "silence", lambda url: None)
    staying = Watch("app", "http://here", {"engines": 2, "ingress": 1}, Signals())
    staying.await_answer()
    with pytest.raises(DistKVError):
        staying.stay()
    assert caplog.messages == ["the application 'app' is unhealthy now", "the application 'app' is running now"]
    assert clock.now == 1000.0 + 6 * LOOK_SECONDS


def test_a_failure_without_distkv_s_own_words_has_the_last_line() -> None:
    assert "failed to start: OSError: gone;" in str(failure(status(0, 0, "Traceback\n  at\nOSError: gone\n")))
    assert "no reason is known" in str(failure(status(0)))
