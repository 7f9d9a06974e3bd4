"""How an LLM begins and ends where nobody sees to it: collected, forgotten, forked, cancelled, interrupted."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.llms import tiered
from support.memory import engine_info
from support.processes import run_code
from support.prompts import random_prompt

import distkv.frontend.front_end
from distkv import LLM, AsyncLLM, DistKVError, SamplingParams, StoreError
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.pools.disk_pool import DiskPool

WATCHED = """
import faulthandler, signal
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm(240)
"""
"""Begins a process that might hang: it ends with the stacks of its threads then."""

COLLECTED = """
import gc, sys, threading
from pathlib import Path
from support.llms import tiered
from support.prompts import random_prompt
from distkv import SamplingParams
from distkv.storage.pools.disk_pool import DiskPool

class Owner:
    def __init__(self, llm, closes):
        self.llm, self.closes, self.cycle = llm, closes, self
    def __del__(self):
        if self.closes:
            self.llm.close()

def start(number):
    return tiered(Path(sys.argv[1]), (8, 8, 30), Path(sys.argv[2]) / str(number), max_cold_bytes_per_step="1GiB")

store, may_store = DiskPool.store, threading.Event()

def collect_and_store(pool, slot, page):
    may_store.wait()
    gc.collect()
    store(pool, slot, page)

DiskPool.store = collect_and_store
gc.disable()
for number, closes in enumerate([False, True]):
    may_store.clear()
    owner = Owner(start(number), closes)
    owner.llm.generate([random_prompt(100, number)], SamplingParams(max_tokens=2), use_tqdm=False)
    ended = owner.llm._front_end.thread._loop.ended
    del owner
    may_store.set()
    ended.wait()
    print("collected", number, flush=True)
DiskPool.store = store
gc.enable()
forgotten = start(2)
forgotten.generate([random_prompt(100, 2)], SamplingParams(max_tokens=2), use_tqdm=False)
"""


def test_what_is_collected_or_forgotten_is_saved_and_hangs_nobody(tiny_model: Path, tmp_path: Path) -> None:
    """Garbage is collected in a thread that writes pages, for which the thread of the engine waits."""
    result = run_code(WATCHED + COLLECTED, tiny_model, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["collected", "0", "collected", "1"]
    for number in range(3):
        [model] = (tmp_path / str(number)).iterdir()
        assert len(Catalogue(model, read_only=True).entries()) == 6


FORKED = """
import asyncio, gc, os, sys, threading
from pathlib import Path
from support.llms import tiered_options
from distkv import LLM, AsyncLLM, DistKVError, SamplingParams
from distkv.frontend.session import Session

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
options = lambda name: tiered_options((8, 8, 30), cache / name, max_cold_bytes_per_step="1GiB")
LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
llm = LLM(folder, **options("a"))
asynchronous = AsyncLLM(folder, **options("b"))
[expected] = llm.generate([[5] * 40], LONG, use_tqdm=False)
stream = llm.stream([6], LONG)
next(stream)
session = Session(cache / "a", "trip")

async def first(outputs):
    async for _ in outputs:
        break

def refused(call):
    try:
        call()
    except DistKVError as error:
        assert "forked" in str(error), error
        return
    raise AssertionError("it was not refused")

child = os.fork()
if child == 0:
    signal.alarm(240)
    refused(lambda: llm.generate([[5]], LONG, use_tqdm=False))
    refused(lambda: llm.chat([{"role": "user", "content": "Hello"}], session="other"))
    refused(lambda: llm.stream([5], LONG))
    refused(llm.stats)
    refused(llm.reset_prefix_cache)
    refused(lambda: asyncio.run(first(asynchronous.generate([5], LONG))))
    refused(lambda: asyncio.run(first(asynchronous.chat([], session="other"))))
    refused(lambda: asyncio.run(asynchronous.stats()))
    refused(lambda: asyncio.run(asynchronous.reset_prefix_cache()))
    llm.close()
    asyncio.run(asynchronous.close())
    session.close()
    stream.close()
    del llm, asynchronous, stream, session
    gc.collect()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert list(stream)[-1].finished
assert llm.generate([[5] * 40], LONG, use_tqdm=False)[0].outputs == expected.outputs
for locked in (lambda: LLM(folder, **options("a")), lambda: Session(cache / "a", "trip")):
    try:
        locked()
        raise AssertionError("the lock is gone")
    except DistKVError as error:
        assert str(os.getpid()) in str(error), error
llm.close()
if os.fork() == 0:
    os.execvp("true", ["true"])
os.wait()
asyncio.run(asynchronous.close())
left_open = LLM(folder, **options("a"))
[again] = left_open.generate([[5] * 40], LONG, use_tqdm=False)
assert again.num_cached_tokens_by_tier["disk"] and again.outputs == expected.outputs
"""


def test_a_forked_process_is_refused_and_harms_nobody(tiny_model: Path, tmp_path: Path) -> None:
    result = run_code(WATCHED + FORKED, tiny_model, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_lock_does_not_outlive_its_process_in_a_child(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from distkv.storage.disk.file_lock import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]) / 'lock')\n"
        "if os.fork() == 0:\n"
        "    os.close(1), os.close(2), time.sleep(30), os._exit(0)\n"
        "os._exit(0)\n"
    )
    from distkv.storage.disk.file_lock import FileLock

    assert run_code(code, tmp_path).returncode == 0
    FileLock(tmp_path / "lock").release()


def engine_threads() -> list[str]:
    names = ("distkv-", "kv-")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def await_no_threads() -> None:
    deadline = time.monotonic() + 60
    while engine_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine_threads()


def test_nothing_is_left_of_a_creation_that_was_cancelled(tiny_model: Path, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "1MiB")

    async def main() -> None:
        for milliseconds in range(0, 60, 6):
            task = asyncio.ensure_future(AsyncLLM.create(tiny_model, cache_dir=tmp_path, **sizes))  # type: ignore[arg-type]
            await asyncio.sleep(milliseconds / 1e3)
            task.cancel()
            try:
                await (await task).close()  # it was quicker
            except asyncio.CancelledError:
                cancelled.append(milliseconds)
            await asyncio.to_thread(await_no_threads)
        async with await AsyncLLM.create(tiny_model, cache_dir=tmp_path, **sizes) as llm:  # type: ignore[arg-type]
            assert (await llm.stats()).num_running == 0

    cancelled: list[int] = []
    await_no_threads()
    asyncio.run(main())
    assert 0 in cancelled


class Slow:
    """Stands for `launch`: goes on when it is given up."""

    def __init__(self, engine: object, calls_check: bool):
        self.engine, self.calls_check = engine, calls_check
        self.has_begun = threading.Event()

    def __call__(self, config: object, check: Any) -> object:
        self.has_begun.set()
        while not check.__self__.asked_to_end:
            time.sleep(0.001)
        if self.calls_check:
            check()
        return self.engine


class Closing:
    """An engine that can be closed."""

    def __init__(self) -> None:
        self.info, self.has_work, self.closed = engine_info(), False, threading.Event()

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("how", ["cancel", "interrupt"])
def test_a_start_that_is_given_up_ends_at_the_next_check_or_is_closed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for calls_check in (True, False):
        engine = Closing()
        launch = Slow(engine, calls_check)
        monkeypatch.setattr(distkv.frontend.front_end, "launch", launch)

        async def cancel(launch: Slow = launch) -> None:
            task = asyncio.ensure_future(AsyncLLM.create(tiny_model))
            await asyncio.to_thread(launch.has_begun.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        def interrupt(launch: Slow = launch) -> None:
            launch.has_begun.wait()
            os.kill(os.getpid(), signal.SIGINT)

        if how == "cancel":
            asyncio.run(cancel())
        else:
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                LLM(tiny_model)
            thread.join()
        await_no_threads()
        assert engine.closed.is_set() == (not calls_check)


def test_an_interrupt_while_weights_load_is_one(tmp_path: Path) -> None:
    """And not what some library makes of it in the middle of a tensor."""
    folder, _ = save_llama(tmp_path, num_hidden_layers=40)
    for milliseconds in (5, 20, 50):
        timer = threading.Timer(milliseconds / 1e3, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                LLM(folder, device_kv_bytes="16MiB").close()
        timer.join()
    await_no_threads()


def test_an_interrupted_close_goes_on_and_is_waited_for_by_the_next(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted join would take the thread for ended."""
    engine, may_end = Closing(), threading.Event()
    monkeypatch.setattr(distkv.frontend.front_end, "launch", lambda config, check: engine)
    monkeypatch.setattr(engine, "rest", lambda: None, raising=False)
    monkeypatch.setattr(engine, "close", lambda: may_end.wait(60) and Closing.close(engine))
    llm = LLM(tiny_model)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        llm.close()
    timer.join()
    assert not engine.closed.is_set()
    threading.Timer(0.1, may_end.set).start()
    llm.close()
    assert engine.closed.is_set()
    with pytest.raises(DistKVError, match="closed"):
        llm.stats()


def test_what_a_disk_does_not_take_is_told_at_the_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(DiskPool, "store", refuse)
    with tiered(tiny_model, (8, 8, 30), tmp_path) as llm:
        llm.generate([random_prompt(100, 5)], SamplingParams(max_tokens=2), use_tqdm=False)
    assert "6 KV pages were not saved (the disk refuses more: the disk is full)" in caplog.text


def test_what_the_disk_tier_has_no_room_for_is_told_at_the_end(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiered(tiny_model, (8, 8, 4), tmp_path) as llm:
        llm.generate([random_prompt(100, 5)], SamplingParams(max_tokens=2), use_tqdm=False)
    assert "2 KV pages were not saved (the disk tier is full of pages that were used later)" in caplog.text


NO_THREAD = """
import sys, threading
from distkv import LLM, CapacityError

def refuse(thread):
    raise RuntimeError("can't start new thread")

start, threading.Thread.start = threading.Thread.start, refuse
try:
    LLM(sys.argv[1], device_kv_bytes=2**20)
except CapacityError as error:
    print(error)
threading.Thread.start = start
"""


def test_a_system_that_gives_no_thread_is_one_error_and_holds_no_end_up(tmp_path: Path) -> None:
    ended = run_code(WATCHED + NO_THREAD, save_llama(tmp_path)[0])
    assert ended.returncode == 0, ended.stderr
    assert "there is no memory to go on with (can't start new thread)" in ended.stdout
