"""What an engine's thread runs: it starts the engine, does what others ask between steps, hands out the tokens after
them, and closes the engine in the end."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from distkv.engine.client import EngineClient, OpenAnswers
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed, StepOutput
from distkv.errors import DistKVError, Draining, WorkerDied

log = logging.getLogger(__name__)

ENDED = "the engine is about to end, and has ended this request before it was done; send it again elsewhere, or later"

Start = Callable[[Callable[[], None]], EngineClient]
"""Starts an engine. It calls what it is given now and then, which raises when nobody waits for the engine any more."""


@dataclass(frozen=True)
class Broken:
    """A request that ends by no doing of the engine's step: it was refused, the engine failed or was closed."""

    request_id: str
    error: BaseException


Delivery = StepOutput | Broken
Sink = Callable[[list[Delivery]], None]
"""Takes what has come for the requests that were added with it, once per step. It is called in the engine's thread, so
it must be quick, and may raise RuntimeError when nobody listens any more; its requests end then."""


class EngineLoop:
    """Owns an engine and alone calls it. `run` is the thread; `post` and `ask_to_end` may be called by any other, and
    everything else by what is posted."""

    def __init__(self, start: Start):
        self.started: Future[EngineInfo] = Future()  # raises what the start has failed with
        self.ended = threading.Event()  # the last thing that the thread does
        self.asked_to_end = False
        self.close_error: BaseException | None = None
        self.engine: EngineClient
        self._start = start
        self._open = OpenAnswers()
        self._sinks: dict[str, Sink] = {}  # of the requests with open answers
        self._error: BaseException | None = None  # that ended the engine
        self._error_is_known = False  # to some caller
        self._is_draining = False
        self._drained: list[Future[None]] = []  # that are done when no request runs any more
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None is the last
        self._pause: float | None = None  # seconds after which the idle engine wants to be called; None for never

    def post(self, command: Callable[[], None]) -> None:
        """Has the thread do something between two steps; before `ask_to_end`."""
        self._commands.put(command)

    def ask_to_end(self) -> None:
        """Has the thread close the engine, or give up starting it. Waits for nothing and takes no lock, so that any
        finalizer may call it, in whichever thread garbage is collected."""
        self.asked_to_end = True
        self._commands.put(None)

    def run(self) -> None:
        """Returns when the engine is closed, or could not be started."""
        try:
            if self._begin():
                self._serve()
                self._close()
        finally:
            self.asked_to_end = True
            self.ended.set()

    # --- what is posted ---

    def add(self, requests: list[EngineRequest], sink: Sink) -> None:
        """Queues requests; all that becomes of them goes to `sink`, a refusal too."""
        try:
            self.check_open()
            self.live_engine().add(requests)
        except BaseException as error:
            self._deliver(sink, [Broken(request.request_id, error) for request in requests])
            if isinstance(error, WorkerDied):
                self.end(error, is_known=True)
            return
        self._open.add(requests)
        self._sinks |= {request.request_id: sink for request in requests}

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """Ends answers as `EngineClient.abort` does."""
        if self._error is None:
            self.engine.abort(answers, reason)
            self._open.close(answers)
            self._forget_sinks(request_id for request_id, _ in answers)

    def drain(self, drained: Future[None], at_once: bool) -> None:
        """Takes no more requests, and ends those that run if `at_once`; `drained` is done when none is left."""
        self._is_draining = True
        self._drained.append(drained)
        if at_once and self._sinks and self._error is None:
            log.warning("%d requests are ended before they are done, since the engine is drained", len(self._sinks))
            self.engine.abort([(request_id, None) for request_id in self._sinks])
            self._end_all(RequestFailed(request_id, Draining.__name__, ENDED) for request_id in self._sinks)
        self._tell_drained()

    def check_open(self) -> None:
        """Raises Draining when no more requests are taken."""
        if self._is_draining:
            raise Draining("the engine is about to end and takes no more requests; send them elsewhere, or later")

    def live_engine(self) -> EngineClient:
        """The engine; raises what has ended it."""
        if self._error is not None:
            self._error_is_known = True
            raise self._error.with_traceback(None)  # which would grow with each call
        return self.engine

    def end(self, error: BaseException, is_known: bool = False) -> None:
        """Takes note that the engine has ended. What no caller knows of when the engine is closed, `close` raises."""
        if self._error is None:
            self._error, self._error_is_known = error, is_known or bool(self._sinks)
            if not self._error_is_known:
                log.error("the engine has ended: %s", error)
            self._break_all(error)

    # --- the thread ---

    def _begin(self) -> bool:
        """Starts the engine; False when that has failed."""
        try:
            self._check_wanted()
            self.engine = self._start(self._check_wanted)
        except BaseException as error:
            self._tell_failure(error)
            return False
        self.started.set_result(self.engine.info)
        return True

    def _tell_failure(self, error: BaseException) -> None:
        # no way may lead from here to the error, whose traceback leads here: what it holds is to be freed at once
        started = self.started
        del self.started
        started.set_exception(error)

    def _check_wanted(self) -> None:
        if self.asked_to_end:
            raise DistKVError("the LLM was given up while it started")

    def _serve(self) -> None:
        wait, last = False, False
        while not last:
            try:
                last = not self._obey(wait)
                wait = not last and not self._step()
            except BaseException as error:
                self.end(error)
                wait = True

    def _close(self) -> None:
        self._break_all(DistKVError("the LLM was closed while this request ran; close it after its last request"))
        try:
            self.engine.close()
            if self._error is not None and not self._error_is_known:
                raise self._error
        except BaseException as error:
            self.close_error = error
        del self.engine  # its memory

    def _obey(self, wait: bool) -> bool:
        """Does what has been asked for, or waits for the next command; False when the last one has come."""
        while True:
            try:
                command = self._commands.get(wait, self._pause)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _step(self) -> bool:
        """Runs a step and hands out its outputs; False when there is nothing to do before the next command."""
        self._pause = None
        if self._error is not None:
            return False
        if not self.engine.has_work:
            self._pause = self.engine.rest()
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

    # --- what becomes of requests ---

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
            self.abort([(request_id, None) for request_id, other in self._sinks.items() if other == sink])

    def _forget_sinks(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id not in self._open:
                self._sinks.pop(request_id, None)
        self._tell_drained()

    def _break_all(self, error: BaseException) -> None:
        """Tells all requests in flight that they have ended."""
        self._end_all(Broken(request_id, error) for request_id in self._sinks)

    def _end_all(self, ends: Iterable[Delivery]) -> None:
        """Tells all requests in flight of their end."""
        deliveries: dict[Sink, list[Delivery]] = {}
        for end in ends:
            deliveries.setdefault(self._sinks[end.request_id], []).append(end)
        self._sinks, self._open = {}, OpenAnswers()
        for sink, ended in deliveries.items():
            self._deliver(sink, ended)
        self._tell_drained()

    def _tell_drained(self) -> None:
        if not self._sinks:
            drained, self._drained = self._drained, []
            for one in drained:
                one.set_result(None)
