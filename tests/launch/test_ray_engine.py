"""The end of an engine on a cluster as its owner sees it, with a group that is made up."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from msgspec.structs import replace
from ray.exceptions import RayTaskError

from distkv.engine.protocol import EngineInfo, Logged, Saving, Shutdown, Tokens, Working, decode_command, encode
from distkv.engine.stats import EngineStats
from distkv.errors import StoreError, WorkerDied
from distkv.launch import ray_engine, watchdog
from distkv.launch.ray_engine import RayEngine
from distkv.workers.group import drain_watch, ray_group
from distkv.workers.group.drain_watch import Notice
from distkv.workers.group.private_socket import bind_private
from distkv.workers.group.ray_group import RayGroup

INFO = EngineInfo(1 << 20, 64, 2048, 16, 1, 1, 1, 1, 1, 1, 128, (2,), 0, "/cache", fingerprint="f")
DEATH = WorkerDied(1, "node", "it was killed")


class Group:
    """A `RayGroup`. A look at its ranks is the next of `looks`, which may raise; after the last one they are done."""

    def __init__(self) -> None:
        self.looks: list[Callable[[], None]] = []
        self.closed = False
        self.notice: Notice | None = None
        self.nodes = [SimpleNamespace(host="node")]
        self.context = zmq.Context()
        self.leader, self.request_address = bind_private(self.context, "127.0.0.1")

    def start(self, *_: object) -> None:
        threading.Thread(target=self._lead).start()

    def _lead(self) -> None:
        self.leader.recv()
        self.say(EngineStats(0, 0, 0, 0))

    def say(self, message: Any) -> None:
        self.leader.send(encode(message))

    def is_finished(self) -> bool:
        if not self.looks:
            return True
        self.looks.pop(0)()
        return False

    def check(self) -> None:
        self.is_finished()

    def check_stopped(self) -> None:
        """No process of its is."""

    def close(self) -> None:
        self.closed = True
        self.context.destroy(linger=0)


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group()
    yield group
    assert group.closed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(ray_engine, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(ray_engine, "DEATH_POLL", 60_000)  # a word comes at each look
    return clock


def test_a_save_may_last_as_long_as_it_gets_on(
    group: Group, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def look(left: int) -> None:
        clock.now += 50
        group.say(Logged([(logging.WARNING, "distkv.some.module", f"still {left}")]))
        group.say(Saving(left))

    engine = RayEngine(group, INFO)  # type: ignore[arg-type]
    group.looks = [lambda left=left: look(left) for left in range(9, 0, -1)]
    engine.close()
    assert group.closed
    assert [record.message for record in caplog.records] == [f"still {left}" for left in range(9, 0, -1)]
    engine.close()


def test_a_save_that_does_not_get_on_is_cut_off_and_told(group: Group, clock: SimpleNamespace) -> None:
    def look() -> None:
        clock.now += 25
        group.say(Saving(7))

    engine = RayEngine(group, INFO)  # type: ignore[arg-type]
    group.looks = [look] * 10
    with pytest.raises(StoreError, match="7 KV pages are missing"):
        engine.close()
    assert len(group.looks) == 6


@pytest.mark.parametrize("timeout", [None, 20])
def test_a_save_begins_after_the_step_that_the_ranks_are_at(
    group: Group, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, timeout: int | None
) -> None:
    """They look at what they are asked for between two steps, and its time counts from then on."""
    monkeypatch.setattr(ray_engine, "DEATH_POLL", 0)

    def look(word: Any) -> None:
        clock.now += 25
        group.say(word)
        assert engine.socket.poll(60_000)

    engine = RayEngine(group, replace(INFO, save_timeout=timeout))  # type: ignore[arg-type]
    words = [*[Working()] * 6, Saving(2), Saving(1)]
    group.looks = [lambda word=word: look(word) for word in words]
    engine.close()
    assert not group.looks


@pytest.mark.parametrize("goes", [False, True])
def test_a_save_that_is_late_is_cut_off(
    group: Group, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, goes: bool
) -> None:
    """After its own time, and where the node goes whatever the ranks are at."""
    monkeypatch.setattr(ray_engine, "DEATH_POLL", 0)
    monkeypatch.setattr(drain_watch, "time", ray_engine.time)

    def look() -> None:
        clock.now += 25
        group.say(Working() if goes else Saving(7))
        assert engine.socket.poll(60_000)

    engine = RayEngine(group, replace(INFO, save_timeout=20), leaves=False)  # type: ignore[arg-type]
    if goes:
        group.notice = Notice("0", clock.now, clock.now + 40, has_room=False)
    group.looks = [look] * 10
    with pytest.raises(StoreError, match="have not ended 10 s after the 20 s that they had to save the cache"):
        engine.close()
    assert len(group.looks) == 7


def test_ranks_that_hang_before_they_save_are_cut_off(
    group: Group, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As late as in any step: they may be silent for longer than ever before."""
    monkeypatch.setattr(watchdog, "time", ray_engine.time)
    monkeypatch.setattr(ray_engine, "DEATH_POLL", 0)
    monkeypatch.setattr(ray_engine, "LAST_WORD", 0)
    engine = RayEngine(group, INFO, hang_timeout=100)  # type: ignore[arg-type]
    group.blame_for_hang = lambda seconds: fail()  # type: ignore[attr-defined]

    def look() -> None:
        clock.now += 1

    group.looks = [look] * 200
    with pytest.raises(WorkerDied, match="it was killed"):
        engine.close()
    assert 90 < len(group.looks) < 110


def test_what_is_logged_makes_no_wait_longer(
    group: Group, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes its time, however many messages come that are none of its tokens."""
    engine = RayEngine(group, INFO)  # type: ignore[arg-type]

    class Socket:
        num_left = 100

        def poll(self, wait: int) -> bool:
            clock.now += min(wait, 3) / 1e3
            return self.num_left > 0 and wait > 3

        def recv(self) -> bytes:
            self.num_left -= 1
            return encode(Logged([]))

    socket: Any = Socket()
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_socket", socket)
        before = clock.now
        assert engine.step(wait=10) == [] and clock.now - before < 0.02
    engine.close()


def test_a_rank_that_dies_while_saving_is_told_with_numbers(
    group: Group, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    engine = RayEngine(group, INFO)  # type: ignore[arg-type]
    group.looks = [lambda: group.say(Saving(12)), lambda: group.say(Saving(5)), fail, fail]
    with pytest.raises(WorkerDied, match="it was killed"):
        engine.close()
    assert "5 KV pages were not saved" in caplog.text


def fail() -> None:
    raise DEATH


@pytest.mark.parametrize("words, told", [([Tokens([]), Saving(9)], "9"), ([Saving(0)], ""), ([], "an unknown number")])
def test_a_rank_that_dies_while_nobody_waits_is_noticed(
    group: Group, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, words: list[Any], told: str
) -> None:
    monkeypatch.setattr(ray_engine, "LAST_WORD", 200 if not words else 60_000)
    engine = RayEngine(group, INFO)  # type: ignore[arg-type]
    group.looks = [lambda: None]
    assert engine.rest() is not None

    def die() -> None:
        for word in words:
            group.say(word)
        fail()

    group.looks = [die]
    with pytest.raises(WorkerDied):
        engine.rest()
    assert group.closed and engine.rest() is None
    assert (f"{told} " in caplog.text and "not saved" in caplog.text) if told else not caplog.records
    engine.close()


@pytest.mark.parametrize("call", ["add", "stats", "reset_prefix_cache", "rest", "close"])
def test_a_leader_that_is_gone_is_not_waited_for(group: Group, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Its end of the connection is no more some time before the cluster says that it has died."""
    monkeypatch.setattr(ray_engine, "LAST_WORD", 1)
    engine = RayEngine(group, INFO)  # type: ignore[arg-type]
    group.leader.close(linger=0)
    while engine.socket.poll(0, zmq.POLLOUT):
        time.sleep(0.01)
    engine.abort([("somebody's", None)])
    group.looks = [fail] if call == "rest" else [lambda: None, fail, fail]
    with pytest.raises(WorkerDied, match="it was killed"):
        getattr(engine, call)(*[[]] * (call == "add"))
    assert group.closed
    engine.close()


def test_it_ends_before_its_node_goes_and_tells_its_owner(
    group: Group, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the time that there is before that, or half a minute; the ranks have the rest of it."""
    monkeypatch.setattr(drain_watch, "time", ray_engine.time)
    engine = RayEngine(group, INFO)  # type: ignore[arg-type]
    group.rank_on = lambda node_id: int(node_id)  # type: ignore[attr-defined]
    assert engine.rest() is not None
    group.notice = Notice("0", clock.now, clock.now + 40, has_room=False)
    clock.now += 19
    assert engine.rest() is not None and engine.step(0) == []
    clock.now += 2
    commands: list[Any] = []

    def end() -> None:
        commands.append(decode_command(group.leader.recv()))
        group.say(Saving(0))

    group.looks = [end]
    with pytest.raises(WorkerDied, match="Ray drains the node, which goes in 19 s, and the cache was saved"):
        engine.step(0)
    assert group.closed and commands == [Shutdown(save_timeout=16)]
    engine.close()


def test_whatever_ends_a_rank_of_an_engine_that_runs_is_its_death(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else callers would take it for a refusal of what they asked for, and go on; while it starts, it is the reason."""
    error = StoreError("the catalogue cannot be read")
    ranks = object.__new__(RayGroup)
    ranks.size, ranks._mains, ranks.nodes = 1, ["main"], group.nodes  # type: ignore[assignment]
    monkeypatch.setattr(ray_group, "ray", SimpleNamespace(wait=lambda mains, **_: (mains, [])))
    monkeypatch.setattr(ray_group, "failure_of", lambda _: RayTaskError("lead", "", error))
    with pytest.raises(WorkerDied, match="rank 0 on node node died: StoreError: the catalogue cannot be read") as died:
        ranks.check()
    assert died.value.__cause__ is error
    group.start, group.looks = lambda *_: None, [ranks.check]  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="the catalogue cannot be read"):
        RayEngine(group, INFO)  # type: ignore[arg-type]
