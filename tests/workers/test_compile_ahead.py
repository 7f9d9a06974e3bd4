"""What few steps need is compiled in threads; a step that comes first does it itself, or waits for the one that is at
it."""

import threading
from concurrent.futures import wait

import pytest

from distkv.workers.runners import compile_ahead
from distkv.workers.runners.compile_ahead import CompileAhead, join_compilers

WAIT = 20.0


def test_each_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 2)
    compiled: list[int] = []
    begun, go_on = threading.Semaphore(0), threading.Event()

    def compile(count: int) -> None:
        begun.release()
        assert go_on.wait(WAIT)
        compiled.append(count)

    ahead = CompileAhead(compile, range(2, 7))
    for _ in range(2):  # threads are at 2 and 3
        assert begun.acquire(timeout=WAIT)
    ahead.claim(1)  # it was compiled at start
    ahead.claim(5)  # nobody has begun, so the caller does it
    claimed = threading.Thread(target=ahead.claim, args=(3,))
    claimed.start()
    claimed.join(0.05)
    assert claimed.is_alive(), "it waits for the thread that is at it"
    go_on.set()
    claimed.join(WAIT)
    assert not claimed.is_alive()
    join_compilers()
    assert sorted(compiled) == [2, 3, 4, 6]
    for count in (2, 4, 6, 6):
        ahead.claim(count)


def test_what_cannot_be_compiled_is_no_matter_of_the_threads() -> None:
    """It shows in the launch."""

    def fail(count: int) -> None:
        raise RuntimeError("out of shared memory")

    ahead = CompileAhead(fail, [2])
    wait(ahead._tasks.values(), WAIT)
    ahead.claim(2)


def test_nothing_is_compiled_for_a_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: False)
    ahead = CompileAhead(compiled.append, [2])
    wait(ahead._tasks.values(), WAIT)
    assert not compiled
