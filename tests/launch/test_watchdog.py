"""When ranks count as hung."""

from types import SimpleNamespace

import pytest

from distkv.launch import watchdog as module
from distkv.launch.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def looks(clock: SimpleNamespace, watchdog: Watchdog, seconds: float) -> bool:
    """What the last look says, of one every half second."""
    hung = False
    for _ in range(int(2 * seconds)):
        clock.now += 0.5
        hung = watchdog.is_hung()
    return hung


def test_ranks_hang_when_they_take_longer_than_ever_by_the_patience(clock: SimpleNamespace) -> None:
    watchdog = Watchdog(10)
    assert not looks(clock, watchdog, 10) and looks(clock, watchdog, 0.5)
    watchdog.heard()
    assert not looks(clock, watchdog, 20.5) and looks(clock, watchdog, 0.5)


def test_time_without_work_is_no_silence(clock: SimpleNamespace) -> None:
    watchdog = Watchdog(10)
    clock.now += 1000
    watchdog.begin()
    assert not looks(clock, watchdog, 10) and looks(clock, watchdog, 0.5)


def test_who_was_stopped_itself_blames_nobody(clock: SimpleNamespace) -> None:
    watchdog = Watchdog(10)
    clock.now += 1000
    assert not watchdog.is_hung()
    assert not looks(clock, watchdog, 9)
