"""Several engines as one, with engines that are made up: who gets what, and what becomes of it when one is lost."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.scripted_engine import ScriptedEngine

from distkv.engine.protocol import EngineRequest, RequestFailed, StepOutput, TokenOutput
from distkv.engine.stats import EngineStats
from distkv.errors import CapacityError, ConfigError, DistKVError, EngineUnavailable, WorkerDied
from distkv.launch import pool as pool_module
from distkv.launch.pool import EnginePool
from distkv.sampling_params import SamplingParams

SCRIPT = [5, 6, 7, 8, 9]
DEATH = WorkerDied(0, "node", "it was killed")


class Engine(ScriptedEngine):
    """One that says at once what it has to say, until it is told to die or to refuse."""

    def __init__(self, script: list[int] = SCRIPT) -> None:
        super().__init__(script)
        self.death: Exception | None = None
        self.refusal: Exception | None = None
        self.notice: SimpleNamespace | None = None
        self.has_to_leave = False
        self.may_close = threading.Event()
        self.may_close.set()
        self.closed = False

    @property
    def has_unread(self) -> bool:
        return self.has_work

    def _live(self) -> None:
        if self.death is not None:
            raise self.death

    def add(self, requests: list[EngineRequest]) -> None:
        self._live()
        if self.refusal is not None:
            raise self.refusal
        super().add(requests)

    def step(self, wait: int = 0) -> list[StepOutput]:
        self._live()
        return super().step()

    def rest(self) -> None:
        self._live()

    def stats(self) -> EngineStats:
        self._live()
        return super().stats()

    def close(self) -> None:
        assert not self.closed and self.may_close.wait(20)
        self.closed = True


class Engines:
    """Where engines start: each in turn is what `next_ones` says, or a new one."""

    def __init__(self) -> None:
        self.made: list[Engine] = []
        self.next_ones: list[Any] = []
        self.num_starts = Counter[int]()
        self.started = set[int]()
        self.num_releases = 0

    def start(self, number: int, is_anew: bool, check: Callable[[], None]) -> Engine:
        assert is_anew == (number in self.started)
        self.num_starts[number] += 1
        what = self.next_ones.pop(0) if self.next_ones else Engine()
        while what == "slow":
            check()
            time.sleep(0.001)
        if isinstance(what, Exception):
            raise what
        self.made.append(what)
        self.started.add(number)
        return what

    def release(self) -> None:
        self.num_releases += 1

    def pool(self, size: int, max_rank_failures: int = 5, rebuild_timeout: float = 600.0) -> EnginePool:
        made = EnginePool(
            self.start, size, max_rank_failures, rebuild_timeout, lambda: None, self.release  # type: ignore[arg-type]
        )  # fmt: skip
        while sum(member.starting is not None for member in made._members):
            made.rest()
        return made


@pytest.fixture
def engines() -> Iterator[Engines]:
    yield Engines()


def request(number: int, prompt: list[int] | None = None) -> EngineRequest:
    return EngineRequest(str(number), prompt or [number], SamplingParams(), 10, 0)


def finish(pool: EnginePool, answers: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    """Steps until nothing is left to do; the tokens of each request."""
    answers = {} if answers is None else answers
    deadline = time.monotonic() + 20
    while pool.has_work:
        assert time.monotonic() < deadline
        take(pool, answers)
    return answers


def take(pool: EnginePool, answers: dict[str, list[int]]) -> None:
    for output in pool.step():
        assert isinstance(output, TokenOutput), output
        answers.setdefault(output.request_id, []).append(output.token_id)


def test_requests_are_spread_and_go_where_their_beginning_is_known(engines: Engines) -> None:
    pool = engines.pool(2)
    assert pool.info.num_engines == 2
    beginnings = [[number] * 32 for number in range(4)]
    pool.add([request(number, one) for number, one in enumerate(beginnings)])
    assert sorted(len(engine.prompts) for engine in engines.made) == [2, 2]
    assert pool.stats().num_running == 4
    assert finish(pool) == {str(number): SCRIPT for number in range(4)}
    before = [list(engine.prompts) for engine in engines.made]
    pool.add([request(10 + number, [*one, 9]) for number, one in enumerate(beginnings)])
    for engine, prompts in zip(engines.made, before, strict=True):
        assert engine.prompts == [*prompts, *([*one, 9] for one in prompts)]
    pool.close()
    pool.close()
    assert all(engine.closed for engine in engines.made) and engines.num_releases == 1


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_steps", range(5))
def test_callers_of_a_lost_engine_miss_nothing(engines: Engines, size: int, num_steps: int) -> None:
    pool = engines.pool(size)
    pool.add([request(number) for number in range(4)])
    answers: dict[str, list[int]] = {}
    for _ in range(num_steps):
        take(pool, answers)
    lost = engines.made[0]
    lost.death = DEATH
    assert finish(pool, answers) == {str(number): SCRIPT for number in range(4)}
    while len(engines.made) == size:
        pool.rest()
    pool.add([request(number) for number in range(5, 9)])
    assert finish(pool) == {str(number): SCRIPT for number in range(5, 9)}
    pool.close()
    assert [engine.closed for engine in engines.made] == [engine is not lost for engine in engines.made]


@pytest.mark.parametrize(
    "ask", [lambda pool: pool.rest(), lambda pool: pool.stats(), lambda pool: pool.add([request(1)])]
)
def test_a_death_is_noticed_whoever_meets_it(
    engines: Engines, ask: Callable[[EnginePool], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "REST", 0.0)
    pool = engines.pool(1)
    engines.made[0].death = DEATH
    ask(pool)
    pool.add([request(2)])
    assert finish(pool)["2"] == SCRIPT
    pool.close()


@pytest.mark.parametrize("has_room", [True, False])
def test_an_engine_whose_node_goes_moves_without_a_failure(engines: Engines, has_room: bool) -> None:
    """At once where there is room elsewhere, and when it must where there is none. The next one has the cache after."""
    pool = engines.pool(2, max_rank_failures=0)
    pool.add([request(number) for number in range(4)])
    answers: dict[str, list[int]] = {}
    take(pool, answers)
    moved = engines.made[0]
    moved.may_close.clear()
    moved.notice = SimpleNamespace(has_room=has_room)
    if not has_room:
        take(pool, answers)
        assert not moved.may_close.is_set() and sum(one.engine is moved for one in pool._members) == 1
        moved.has_to_leave = True
    assert finish(pool, answers) == {str(number): SCRIPT for number in range(4)}
    assert len(engines.made) == 2 and not moved.closed
    moved.may_close.set()
    while len(engines.made) == 2:
        pool.rest()
    assert moved.closed
    pool.close()
    assert all(engine.closed for engine in engines.made) and engines.num_starts.total() == 3


def test_a_request_that_moves_again_and_again_is_not_blamed(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    pool = engines.pool(1)
    pool.add([request(1)])
    answers: dict[str, list[int]] = {}
    for _ in range(4):
        engines.made[-1].notice = SimpleNamespace(has_room=True)
        number = len(engines.made)
        while len(engines.made) == number:
            take(pool, answers)
    assert finish(pool, answers) == {"1": SCRIPT}
    engines.made[-1].notice = SimpleNamespace(has_room=True)
    engines.made[-1].may_close.clear()
    pool.rest()
    threading.Timer(0.05, engines.made[-1].may_close.set).start()
    pool.close()
    assert all(engine.closed for engine in engines.made)


def test_too_many_deaths_are_told(engines: Engines) -> None:
    pool = engines.pool(1, max_rank_failures=2)
    for _ in range(2):
        engines.made[-1].death = DEATH
        pool.add([request(1)])
        finish(pool)
    engines.made[-1].death = DEATH
    with pytest.raises(WorkerDied, match="it was killed"):
        pool.add([request(1)])
    pool.close()


def test_old_deaths_do_not_count(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FAILURE_WINDOW", 0.0)
    pool = engines.pool(1, max_rank_failures=1)
    for _ in range(4):
        engines.made[-1].death = DEATH
        pool.add([request(1)])
        assert finish(pool) == {"1": SCRIPT}
    pool.close()


def test_a_request_that_engines_die_of_is_given_up(engines: Engines) -> None:
    class Dying(Engine):
        def step(self, wait: int = 0) -> list[StepOutput]:
            raise DEATH

    engines.next_ones = [Dying() for _ in range(3)]
    pool = engines.pool(1)
    pool.add([request(7)])
    outputs: list[StepOutput] = []
    while pool.has_work:
        outputs += pool.step()
    [failed] = outputs
    assert isinstance(failed, RequestFailed) and "lost 3 times" in failed.message and failed.error == "DistKVError"
    pool.add([request(8)])
    assert finish(pool) == {"8": SCRIPT}
    pool.close()


def test_work_begins_with_the_first_and_others_come_later(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "RETRY_SECONDS", 0.0)
    engines.next_ones = [Engine(), CapacityError("no room"), CapacityError("no room"), CapacityError("no room")]
    pool = engines.pool(2)
    pool.add([request(1)])
    assert finish(pool) == {"1": SCRIPT}
    while len(engines.made) < 2:
        pool.rest()
    assert caplog.text.count("no room") == 1
    pool.close()


def test_what_waits_for_room_runs_when_there_is_some(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "RETRY_SECONDS", 0.0)
    pool = engines.pool(1)
    answers: dict[str, list[int]] = {}
    pool.add([request(1), request(2)])
    take(pool, answers)
    pool.check_ready()
    engines.next_ones = [CapacityError("no room")] * 3
    engines.made[0].death = DEATH
    take(pool, answers)
    pool.add([request(3)])
    assert pool.stats().num_waiting == 3
    pool.abort([("2", None)])
    take(pool, answers)
    with pytest.raises(
        EngineUnavailable, match=r"no engine has run for 0 s, and one is started anew: (rank 0 .*|no room)"
    ):
        pool.check_ready()
    assert finish(pool, answers) == {"1": SCRIPT, "2": SCRIPT[:1], "3": SCRIPT}
    pool.rest()
    pool.check_ready()
    pool.close()


def test_what_waits_for_too_long_is_told_so(engines: Engines) -> None:
    pool = engines.pool(1, rebuild_timeout=0.01)
    pool.add([request(1)])
    engines.next_ones = [CapacityError("no room")]
    engines.made[0].death = DEATH
    outputs: list[StepOutput] = []
    while pool.has_work:
        outputs += pool.step()
    [failed] = outputs
    assert isinstance(failed, RequestFailed) and failed.error == "EngineUnavailable"
    assert failed.message.startswith("no engine could be started anew for 0.01 s")
    pool.close()


def test_a_request_that_one_engine_refuses_takes_the_others_along(engines: Engines) -> None:
    pool = engines.pool(2)
    engines.made[1].refusal = CapacityError("it could never run")
    with pytest.raises(CapacityError, match="never run"):
        pool.add([request(number) for number in range(4)])
    assert not pool.has_work and not any(engine.has_work for engine in engines.made)
    pool.close()


def test_one_that_is_refused_after_it_has_waited_fails_alone(engines: Engines) -> None:
    pool = engines.pool(1)
    refusing = Engine()
    refusing.refusal = CapacityError("it could never run")
    engines.next_ones = [refusing]
    engines.made[0].death = DEATH
    pool.add([request(1)])
    outputs: list[StepOutput] = []
    while pool.has_work:
        outputs += pool.step()
    assert [(output.error, output.message) for output in outputs] == [("CapacityError", "it could never run")]  # type: ignore[union-attr]
    pool.close()


def test_a_request_goes_on_where_it_stood(engines: Engines) -> None:
    """The next engine is told what the caller has, and says nothing of that again."""
    pool = engines.pool(1)
    answers: dict[str, list[int]] = {}
    pool.add([request(1)])
    for _ in range(2):
        take(pool, answers)
    engines.next_ones = [Engine([50, 60, 70, 80])]
    engines.made[0].death = DEATH
    assert finish(pool, answers) == {"1": [*SCRIPT[:2], 70, 80]}
    pool.close()


def test_a_start_that_fails_everywhere_is_told(engines: Engines) -> None:
    engines.next_ones = [ConfigError("no such model")] * 2
    with pytest.raises(ConfigError, match="no such model"):
        engines.pool(2)
    assert engines.num_releases == 1


def test_closing_gives_up_what_starts(engines: Engines) -> None:
    engines.next_ones = [Engine(), "slow"]
    pool = EnginePool(engines.start, 2, 0, 600.0, lambda: None, engines.release)  # type: ignore[arg-type]
    pool.close()
    assert [engine.closed for engine in engines.made] == [True] and engines.num_releases == 1


def test_a_start_that_is_not_wanted_any_more_ends(engines: Engines) -> None:
    def check() -> None:
        raise DistKVError("given up")

    engines.next_ones = ["slow", "slow"]
    with pytest.raises(DistKVError, match="given up"):
        EnginePool(engines.start, 2, 0, 600.0, check, engines.release)  # type: ignore[arg-type]
    assert engines.made == [] and engines.num_releases == 1


@pytest.mark.parametrize("leaves", [False, True])
def test_all_close_though_one_fails(engines: Engines, caplog: pytest.LogCaptureFixture, leaves: bool) -> None:
    """Also one that has begun to close before, since its node goes."""

    class Failing(Engine):
        def close(self) -> None:
            super().close()
            raise DEATH

    failing = Failing()
    engines.next_ones = [failing, Engine()]
    pool = engines.pool(2)
    if leaves:
        failing.notice = SimpleNamespace(has_room=True)
        failing.may_close.clear()
        pool.rest()
        threading.Timer(0.05, failing.may_close.set).start()
    with caplog.at_level(logging.ERROR), pytest.raises(WorkerDied):
        pool.close()
    assert all(engine.closed for engine in engines.made) and engines.num_releases == 1
