"""The thread that runs an engine: between steps it does what others ask, and after them it hands out the tokens."""

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from distkv.engine.client import EngineClient, OpenAnswers
from distkv.engine.protocol import EngineRequest, StepOutput
from distkv.errors import DistKVError, WorkerDied

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Broken:
    """A request that ends by no doing of the engine's step: it was refused, the engine failed or was closed."""

    request_id: str
    error: BaseException


Delivery = StepOutput | Broken
Sink = Callable[[list[Delivery]], None]
"""Takes what has come for the requests that were added with it, once per step. It is called in the engine's thread, so
it must be quick, and may raise RuntimeError when nobody listens any more; its requests end then."""


class EngineThread:
    """Owns an engine and alone calls it. All methods may be called by any thread.

    An error that ends the engine breaks all requests in flight, and every later call raises it. After any other
    exception in a step, its requests are broken and the engine goes on.
    """

    def __init__(self, engine: EngineClient):
        self.engine = engine  # for tests, which may look at it while it has no work
        self._open = OpenAnswers()
        self._sinks: dict[str, Sink] = {}  # of the requests with open answers
        self._error: BaseException | None = None  # that ended the engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None is the last
        # held while a command is queued; a garbage collection in the middle of that may queue another
        self._lock = threading.RLock()
        self._closing = False
        self._close_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="distkv-engine", daemon=True)
        self._thread.start()
        # a daemon thread must not be within torch when the interpreter ends; and atexit itself comes only after the
        # executors that steps and transfers need have been shut down
        threading._register_atexit(_close_if_alive, weakref.ref(self))  # type: ignore[attr-defined]

    def add(self, requests: list[EngineRequest], sink: Sink) -> None:
        """Queues requests; all that becomes of them goes to `sink`, a refusal too. Raises DistKVError once closed."""
        self._post(lambda: self._add(requests, sink))

    def abort(self, answers: list[tuple[str, int | None]]) -> None:
        """Ends answers as `EngineClient.abort` does; nothing to do once closed."""
        with self._lock:
            if not self._closing:
                self._post(lambda: self._abort(answers))

    def call(self, function: Callable[[EngineClient], Result]) -> Future[Result]:
        """Has the thread call a function with the engine between two steps. Raises DistKVError once closed."""
        future: Future[Result] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._live_engine()))
            except BaseException as error:
                future.set_exception(error)
                if isinstance(error, WorkerDied):
                    self._end(error)

        self._post(command)
        return future

    def close(self) -> None:
        """Breaks what is in flight, closes and drops the engine, and waits for that. A second call does nothing."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._commands.put(None)
        if threading.current_thread() is not self._thread:  # where garbage may be collected too
            self._thread.join()
            error, self._close_error = self._close_error, None
            if error is not None:
                raise error

    def _post(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closing:
                raise DistKVError("this LLM is closed; make a new one")
            self._commands.put(command)

    def _run(self) -> None:
        wait, last = True, False
        while not last:
            try:
                last = not self._obey(wait)
                wait = not last and not self._step()
            except BaseException as error:
                self._end(error)
                wait = True
        self._break_all(DistKVError("the LLM was closed while this request ran; close it after its last request"))
        try:
            self.engine.close()
        except BaseException as error:
            self._close_error = error
        del self.engine  # its memory

    def _obey(self, wait: bool) -> bool:
        """Does what has been asked for, or waits for the next command; False when the last one has come."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _step(self) -> bool:
        """Runs a step and hands out its outputs; False when there is nothing to do before the next command."""
        if self._error is not None or not self.engine.has_work:
            return False
        try:
            outputs = self.engine.step()
        except DistKVError:
            raise
        except BaseException as error:
            log.exception("a step failed, and with it %d requests", len(self._sinks))
            answers: list[tuple[str, int | None]] = [(request_id, None) for request_id in self._sinks]
            self._break_all(error)
            self.engine.abort(answers)
            return False
        self._hand_out(outputs)
        return True

    def _add(self, requests: list[EngineRequest], sink: Sink) -> None:
        try:
            self._live_engine().add(requests)
        except BaseException as error:
            self._deliver(sink, [Broken(request.request_id, error) for request in requests])
            if isinstance(error, WorkerDied):
                self._end(error)
            return
        self._open.add(requests)
        self._sinks |= {request.request_id: sink for request in requests}

    def _abort(self, answers: list[tuple[str, int | None]]) -> None:
        if self._error is None:
            self.engine.abort(answers)
            self._open.close(answers)
            self._forget_sinks(request_id for request_id, _ in answers)

    def _live_engine(self) -> EngineClient:
        if self._error is not None:
            raise self._error.with_traceback(None)  # which would grow with each call
        return self.engine

    def _hand_out(self, outputs: list[StepOutput]) -> None:
        deliveries: dict[Sink, list[Delivery]] = {}
        for output in outputs:
            if output.request_id in self._sinks:
                deliveries.setdefault(self._sinks[output.request_id], []).append(output)
        self._open.take(outputs)
        self._forget_sinks(output.request_id for output in outputs)
        for sink, delivered in deliveries.items():
            self._deliver(sink, delivered)

    def _deliver(self, sink: Sink, deliveries: list[Delivery]) -> None:
        try:
            sink(deliveries)
        except RuntimeError:  # an event loop that was closed
            self._abort([(request_id, None) for request_id, other in self._sinks.items() if other == sink])

    def _forget_sinks(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id not in self._open:
                self._sinks.pop(request_id, None)

    def _break_all(self, error: BaseException) -> None:
        """Tells all requests in flight that they have ended."""
        sinks, self._sinks, self._open = self._sinks, {}, OpenAnswers()
        deliveries: dict[Sink, list[Delivery]] = {}
        for request_id, sink in sinks.items():
            deliveries.setdefault(sink, []).append(Broken(request_id, error))
        for sink, broken in deliveries.items():
            self._deliver(sink, broken)

    def _end(self, error: BaseException) -> None:
        """Takes note that the engine has ended."""
        if self._error is None:
            self._error = error
            self._break_all(error)


def _close_if_alive(thread: "weakref.ref[EngineThread]") -> None:
    alive = thread()
    if alive is not None:
        alive.close()
