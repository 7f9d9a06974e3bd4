"""All replicas of an application as one engine, as the front end in an ingress asks it."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpc.aio import AioRpcError
from msgspec.structs import replace
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from distkv.engine.loop import Broken, Delivery, Sink
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed, StepOutput
from distkv.engine.replay import Replay
from distkv.engine.stats import EngineStats, total
from distkv.errors import DistKVError, EngineUnavailable
from distkv.ray_serve.pieces import Piece, decode_info, decode_piece, decode_stats, encode

log = logging.getLogger(__name__)

MOST_RUNS = 3  # of a request whose replicas are lost under it
STATS_SECONDS = 10.0  # in which each replica is to tell its state
READY_SECONDS = 3.0  # in which each is to say whether it has an engine
LOOK_SECONDS = 1.0  # between two looks whether there are replicas, when this server ends


@dataclass
class _InFlight:
    """A request, and where it is."""

    replay: Replay
    sink: Sink
    run_id: str = ""  # the request's name at the replica
    replica: str | None = None  # that has begun to answer
    avoid: dict[str, float] = field(default_factory=dict)  # replicas that it was lost at, and monotonic times of that


class ServeEngine:
    """A `RunningEngine` that is several: each request goes to one replica. When that is lost under it, another one
    goes on behind what the caller has already.

    Made in an event loop, where all of it runs.
    """

    def __init__(self, engines: DeploymentHandle, name: str, num_engines: int):
        """
        Args:
            name: of this process among those that ask the same replicas.
            num_engines: most replicas that there will be.
        """
        self._loop = asyncio.get_running_loop()
        self._engines = engines.options(request_serialization="pickle", response_serialization="pickle")
        # by gRPC: an object of Ray's for each piece would cost several times as much
        self._stream = self._engines.options(method_name="stream", stream=True, _by_reference=False)
        self._name, self._num_engines, self._num_runs = name, num_engines, 0
        self._in_flight: dict[str, _InFlight] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._told: set[asyncio.Task[None]] = set()  # what replicas are being told
        self._is_closed = False
        self._started = self._call(self._ask_info())

    def wait(self) -> EngineInfo:
        """Waits until a replica has loaded the model."""
        return self._started.result()

    def add(self, requests: list[EngineRequest], sink: Sink) -> None:
        """See `RunningEngine.add`."""
        self.check_alive()
        self._loop.call_soon_threadsafe(self._begin, requests, sink)

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """See `RunningEngine.abort`."""
        if not self._is_closed:
            self._loop.call_soon_threadsafe(self._end, answers, reason)

    def stats(self) -> Future[EngineStats]:
        """The sum of what all replicas tell of themselves."""
        self.check_alive()
        return self._call(self._ask_stats())

    def reset_prefix_cache(self) -> Future[None]:
        """Has all replicas forget the pages that are kept for later requests."""
        self.check_alive()
        return self._call(self._ask_reset())

    def check_alive(self) -> None:
        """Raises DistKVError once closed. Replicas come and go; whoever asks waits for one."""
        if self._is_closed:
            raise DistKVError("this server is ending")

    def check_ready(self) -> Future[None]:
        """Raises DistKVError while no replica has an engine that runs. One that takes its time to say so counts."""
        self.check_alive()
        return self._call(self._ask_ready())

    def check_process(self) -> None:
        """Nobody forks an ingress."""

    def close(self) -> None:
        """Ends what is in flight; the replicas are Serve's to end."""
        self.give_up()

    def give_up(self) -> None:
        """As `close`."""
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._break_all)

    # --- in the event loop ---

    def _begin(self, requests: Sequence[EngineRequest], sink: Sink) -> None:
        for request in requests:
            sent = self._in_flight[request.request_id] = _InFlight(Replay(request), sink)
            task = self._tasks[request.request_id] = self._loop.create_task(self._answer(sent))
            task.add_done_callback(partial(self._forget, request.request_id))  # also of one that never began

    def _end(self, answers: list[tuple[str, int | None]], reason: str) -> None:
        for request_id, index in answers:
            if (sent := self._in_flight.get(request_id)) is None:
                continue
            sent.replay.close(index)
            if not sent.replay.is_open and (reason == "abort" or sent.replica is None):
                self._tasks[request_id].cancel()  # which ends it there
            elif sent.replica is not None:
                self._tell([(sent.run_id, index)], reason, sent)

    def _break_all(self) -> None:
        error = DistKVError("the server has ended while this request ran; send it again")
        for request_id, sent in list(self._in_flight.items()):
            self._tasks[request_id].cancel()
            sent.sink([Broken(request_id, error)])

    async def end_with_engines(self) -> None:
        """Ends what still waits for a replica once Serve has ended all of them: it tells that to new calls alone."""
        while True:
            try:
                await asyncio.wait_for(self._ask_once(), LOOK_SECONDS)
            except DeploymentUnavailableError:
                return self.give_up()
            except Exception as error:
                log.debug("engines do not answer: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask_once(self) -> None:
        await self._engines.info.remote()

    async def _answer(self, sent: _InFlight) -> None:
        """Runs a request, again and again if need be."""
        replay = sent.replay
        request_id = replay.request.request_id
        try:
            while replay.is_open:
                lost = await self._run(sent)
                if lost is None:
                    continue
                log.warning("request %s was lost at replica %s: %s", request_id, sent.replica, lost)
                if replay.num_runs >= MOST_RUNS:
                    self._fail(sent, f"the engines of this request were lost, {MOST_RUNS} times: {lost}; send it again")
        except DeploymentUnavailableError:
            why = "the application has no engine that could answer; `serve status` says why"
            self._fail(sent, why, EngineUnavailable)
        except Exception as error:
            log.exception("request %s failed", request_id)
            self._fail(sent, f"the request failed: {type(error).__name__}; the server's log has more")

    def _forget(self, request_id: str, _: "asyncio.Task[None]") -> None:
        del self._in_flight[request_id], self._tasks[request_id]

    async def _run(self, sent: _InFlight) -> str | None:
        """Has a replica answer a request. Returns why that is to be done again, None when it is over."""
        replay = sent.replay
        again, closed = replay.run(), replay.closed
        self._num_runs += 1
        sent.run_id, sent.replica = f"{self._name}-{self._num_runs}", None
        request = encode(replace(again, request_id=sent.run_id))
        pieces: Any = self._stream.remote(request, closed, avoid=sent.avoid)
        try:
            async for data in pieces:
                piece = decode_piece(data)
                if sent.replica is None:
                    sent.replica = piece.replica
                    self._close_late(sent, closed)
                if self._pass_on(sent, piece):
                    return None
                if piece.lost is not None:
                    sent.avoid[piece.replica] = time.monotonic()
                    return piece.lost
        except RayTaskError:
            raise
        except (RayError, AioRpcError) as error:
            if sent.replica is not None:
                sent.avoid[sent.replica] = time.monotonic()
            return f"its replica has ended ({type(error).__name__})"
        finally:
            pieces.cancel()
        return "its replica has ended the answer early" if replay.is_open else None

    def _close_late(self, sent: _InFlight, closed: Sequence[int | None]) -> None:
        """Ends the answers at a replica that were ended since it was sent the request."""
        late: list[tuple[str, int | None]] = [
            (sent.run_id, index) for index in sent.replay.closed if index not in closed
        ]
        if late:
            self._tell(late, "stop", sent)

    def _tell(self, answers: list[tuple[str, int | None]], reason: str, sent: _InFlight) -> None:
        told = self._engines.abort.remote(answers, reason, replica=sent.replica)
        task = self._loop.create_task(_ignore_loss(told))
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    def _pass_on(self, sent: _InFlight, piece: Piece) -> bool:
        """Gives the caller what is new to it; whether that ends the request with an error."""
        request_id = sent.replay.request.request_id
        deliveries: list[Delivery] = []
        for output in piece.outputs:
            own: StepOutput = replace(output, request_id=request_id)
            if (passed := sent.replay.pass_on(own)) is not None:
                deliveries.append(passed)
        if deliveries:
            sent.sink(deliveries)
        return any(isinstance(one, RequestFailed) for one in deliveries)

    def _fail(self, sent: _InFlight, message: str, kind: type[DistKVError] = DistKVError) -> None:
        failed = sent.replay.pass_on(RequestFailed(sent.replay.request.request_id, kind.__name__, message))
        if failed is not None:
            sent.sink([failed])

    async def _ask_info(self) -> EngineInfo:
        while True:
            try:
                return replace(decode_info(await self._engines.info.remote()), num_engines=self._num_engines)
            except RayTaskError:
                raise
            except RayError:  # it was just replaced
                await asyncio.sleep(1)

    async def _ask_stats(self) -> EngineStats:
        told = self._engines.broadcast("stats").results_async(timeout_s=STATS_SECONDS, return_exceptions=True)
        try:
            stats = [decode_stats(one) for one in await told if isinstance(one, bytes)]
        except (DeploymentUnavailableError, TimeoutError):
            stats = []
        if not stats:
            raise EngineUnavailable("no engine runs at the moment; try again soon")
        return total(stats)

    async def _ask_ready(self) -> None:
        try:
            told = self._engines.broadcast("check_health")
            results = await told.results_async(timeout_s=READY_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            results = []
        except TimeoutError:
            return
        if all(isinstance(one, BaseException) for one in results):
            raise EngineUnavailable("no engine runs at the moment; Ray Serve starts one, and requests wait for it")

    async def _ask_reset(self) -> None:
        try:
            told = await self._engines.broadcast("reset_prefix_cache").results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return  # engines that are to come have no pages
        failed = [one for one in told if isinstance(one, BaseException)]
        if failed:
            raise DistKVError(
                f"{len(failed)} of {len(told)} engines have not forgotten their pages ({failed[0]}); ask again"
            ) from failed[0]

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def _ignore_loss(told: Any) -> None:
    """Waits for what a replica is told that may have ended."""
    try:
        await told
    except (RayError, AioRpcError, DeploymentUnavailableError) as error:
        log.debug("a replica was not told: %s", error)
