"""An engine in a thread of its own, as those see it who ask it for something."""

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait  # noqa: F401  the second so that it ends after ours
from typing import Protocol, TypeVar

from distkv.engine.client import EngineClient
from distkv.engine.loop import EngineLoop, Sink, Start
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.stats import EngineStats
from distkv.errors import CapacityError, DistKVError, WorkerDied
from distkv.storage.process_limits import lack_of_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")

INTERRUPT_SECONDS = 0.2  # in which an interrupt of the start is noticed

_alive: dict[EngineLoop, threading.Thread] = {}  # of this process
_of_parents: list[EngineLoop] = []  # whose threads a forked process does not have; what they hold is not its to close


class _Collection(threading.local):
    """Whether this thread is collecting garbage, and so may be in any finalizer."""

    is_on = False


_collection = _Collection()


class RunningEngine(Protocol):
    """An engine that runs by itself, as those see it who ask it for something. `EngineThread` is one."""

    def wait(self) -> EngineInfo:
        """Waits until the engine has started; raises what that has failed with. To be called once."""
        ...

    def add(self, requests: list[EngineRequest], sink: Sink) -> None:
        """Queues requests; all that becomes of them goes to `sink`, a refusal too. Raises DistKVError once closed."""

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """Ends answers as `EngineClient.abort` does; nothing to do once closed."""

    def stats(self) -> Future[EngineStats]:
        """What the engine tells of itself. Raises DistKVError once closed."""
        ...

    def reset_prefix_cache(self) -> Future[None]:
        """Has the engine forget the pages that are kept for later requests. Raises DistKVError once closed."""
        ...

    def check_alive(self) -> None:
        """Raises what has ended the engine, DistKVError once closed."""

    def check_ready(self) -> Future[None]:
        """Raises DistKVError, as `check_alive` does or as its result, while no engine could answer: Draining while it
        is drained."""
        ...

    def check_process(self) -> None:
        """Raises DistKVError in a process that was forked from the one that made it."""

    def close(self) -> None:
        """Breaks what is in flight and frees everything. A second call does nothing."""

    def give_up(self) -> None:
        """As `close`, and waits for nothing at all."""


class EngineThread:
    """Starts an engine, runs it, and closes it, all in the thread: an interrupt, which comes to the main thread, never
    meets it in the middle. All methods may be called by any thread of the process that made it; one that was forked
    from that has no such thread, and all but `close` raise DistKVError there.

    An error that ends the engine breaks all requests in flight, and every later call raises it. After any other
    exception in a step, its requests are broken and the engine goes on. One that nobody holds any more closes itself.
    """

    def __init__(self, start: Start):
        """Raises CapacityError when the system gives no thread."""
        self._loop = EngineLoop(start)
        self._started: Future[EngineInfo] | None = self._loop.started
        self._pid = os.getpid()
        # held while a command is queued; a garbage collection in the middle of that may queue another
        self._lock = threading.RLock()
        # a daemon, which would be cut off at the end of the interpreter if `_close_all` did not wait for it
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="distkv-engine", daemon=True)
        weakref.finalize(self, self._loop.ask_to_end).atexit = False
        _alive[self._loop] = self._thread
        if _note_collection not in gc.callbacks:  # not before: Python drops an interrupt that meets it in there
            gc.callbacks.append(_note_collection)
        try:
            self._thread.start()
        except RuntimeError as error:  # nobody is to wait for it
            del _alive[self._loop]
            self._loop.ended.set()
            raise CapacityError(lack_of_memory(error) or str(error)) from error

    def wait(self) -> EngineInfo:
        """Waits until the engine has started; raises what that has failed with. To be called once."""
        started, self._started = self._started, None
        assert started is not None
        try:
            while not started.done():  # in short waits: an interrupt that comes just before one does not end it
                wait([started], INTERRUPT_SECONDS)
            return started.result()
        finally:
            del started  # an error leads here by its traceback

    @property
    def engine(self) -> EngineClient:
        """For tests, which may look at it while it has no work."""
        return self._loop.engine

    def add(self, requests: list[EngineRequest], sink: Sink) -> None:
        """Queues requests; all that becomes of them goes to `sink`, a refusal too. Raises DistKVError once closed."""
        self._post(lambda: self._loop.add(requests, sink))

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """Ends answers as `EngineClient.abort` does; nothing to do once closed, or in a forked process."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._loop.asked_to_end:
                self._loop.post(lambda: self._loop.abort(answers, reason))

    def call(self, function: Callable[[EngineClient], Result]) -> Future[Result]:
        """Has the thread call a function with the engine between two steps. Raises DistKVError once closed."""
        future: Future[Result] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._loop.live_engine()))
            except BaseException as error:
                future.set_exception(error)
                if isinstance(error, WorkerDied):
                    self._loop.end(error, is_known=True)

        self._post(command)
        return future

    def stats(self) -> Future[EngineStats]:
        """What the engine tells of itself. Raises DistKVError once closed."""
        return self.call(lambda engine: engine.stats())

    def reset_prefix_cache(self) -> Future[None]:
        """Has the engine forget the pages that are kept for later requests. Raises DistKVError once closed."""
        return self.call(lambda engine: engine.reset_prefix_cache())

    def drain(self, at_once: bool = False) -> Future[None]:
        """Takes no more requests from now on: they get a Draining error. What it returns is done when none runs any
        more. `at_once` ends those that run, with the same error and what there is of their answers. Raises DistKVError
        once closed."""
        drained: Future[None] = Future()
        drained.set_running_or_notify_cancel()  # who gives up waiting, as a cancelled task does, calls nothing off
        self._post(lambda: self._loop.drain(drained, at_once))
        return drained

    def close(self) -> None:
        """Breaks what is in flight, closes and drops the engine, and waits for that. A second call does nothing, nor
        does any in a forked process. In a finalizer it waits for nothing: the thread may be one that the engine waits
        for."""
        if os.getpid() != self._pid:
            return
        self.give_up()
        if _collection.is_on or threading.current_thread() is self._thread:
            return
        self._loop.ended.wait()  # `join` would take an interrupt for the end of the thread
        self._thread.join()
        error, self._loop.close_error = self._loop.close_error, None
        if error is not None:
            raise error

    def give_up(self) -> None:
        """As `close`, and waits for nothing at all."""
        if os.getpid() == self._pid:
            with self._lock:
                self._loop.ask_to_end()

    def check_alive(self) -> None:
        """See `RunningEngine.check_alive`."""
        self.check_process()
        if self._loop.asked_to_end:
            raise DistKVError("this LLM is closed; make a new one")
        self._loop.live_engine()

    def check_ready(self) -> Future[None]:
        """See `RunningEngine.check_ready`; waits for nothing."""
        self.check_alive()
        future: Future[None] = Future()
        try:
            self._loop.check_open()
            self._loop.live_engine().check_ready()
            future.set_result(None)
        except DistKVError as error:
            future.set_exception(error)
        return future

    def check_process(self) -> None:
        """Raises DistKVError in a forked process."""
        if os.getpid() != self._pid:
            raise DistKVError(
                f"this LLM works in process {self._pid} alone, and this one was forked from it; make an LLM in a "
                "process of its own, such as multiprocessing's 'spawn' starts"
            )

    def _post(self, command: Callable[[], None]) -> None:
        self.check_process()  # before the lock, which somebody may have held when the process was forked
        with self._lock:
            if self._loop.asked_to_end:
                raise DistKVError("this LLM is closed; make a new one")
            self._loop.post(command)


def _run(loop: EngineLoop) -> None:
    try:
        loop.run()
    finally:
        _alive.pop(loop, None)


def _close_all() -> None:
    """At the end of the interpreter."""
    for loop in list(_alive):
        loop.ask_to_end()
    for loop, thread in list(_alive.items()):
        loop.ended.wait()
        thread.join()
        if loop.close_error is not None:
            log.error("an LLM that was not closed ended with %s: %s", type(loop.close_error).__name__, loop.close_error)


def _disown() -> None:
    _of_parents.extend(_alive)
    _alive.clear()


def _note_collection(phase: str, _: dict[str, int]) -> None:
    _collection.is_on = phase == "start"


# No public hook comes early enough: atexit's functions run after the executors that steps, transfers and zarr need have
# been shut down, and non-daemon threads are joined after that too.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_disown)
