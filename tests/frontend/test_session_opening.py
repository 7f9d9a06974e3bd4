"""A session that is opened in a thread: the event loop goes on, and a task that is cancelled keeps nothing."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from distkv.errors import ConfigError
from distkv.frontend.session import Session
from distkv.frontend.session_opening import open_in_thread

PATIENCE = 60.0


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not is_so():
            await asyncio.sleep(0.001)


def test_the_loop_goes_on_meanwhile(tmp_path: Path) -> None:
    ticked = threading.Event()

    def open_slowly() -> Session:
        assert ticked.wait(PATIENCE)
        return Session(tmp_path, "trip")

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.01, ticked.set)
        with await open_in_thread(open_slowly), pytest.raises(ConfigError, match="session trip is open in process"):
            await open_in_thread(lambda: Session(tmp_path, "trip"))

    asyncio.run(main())
    Session(tmp_path, "trip").close()


@pytest.mark.parametrize("is_open", [False, True])
def test_a_task_that_is_cancelled_leaves_it_free(tmp_path: Path, is_open: bool) -> None:
    """Whether it is being opened then, or is open and the task has yet to hear of it."""
    begun, goes_on, opened = threading.Event(), threading.Event(), list[Session]()

    def open_slowly() -> Session:
        begun.set()
        assert goes_on.wait(PATIENCE)
        opened.append(Session(tmp_path, "trip"))
        return opened[0]

    async def main() -> None:
        task = asyncio.ensure_future(open_in_thread(open_slowly))
        await until(begun.is_set)
        if is_open:
            goes_on.set()
            while not opened:
                """The loop stands still, so that the task does not hear of it."""
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on.set()
        await until(lambda: bool(opened) and not opened[0]._lock.is_held)
        (await open_in_thread(lambda: Session(tmp_path, "trip"))).close()

    asyncio.run(main())


def test_a_loop_that_ends_meanwhile_leaves_it_free(tmp_path: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def open_slowly() -> Session:
        begun.set()
        assert goes_on.wait(PATIENCE)
        return Session(tmp_path, "trip")

    async def main() -> None:
        task = asyncio.ensure_future(open_in_thread(open_slowly))
        await until(begun.is_set)
        task.add_done_callback(lambda _: goes_on.set())

    asyncio.run(main())
    Session(tmp_path, "trip").close()
