"""An engine on a Ray cluster, as the process that owns it sees it."""

import logging
import math
import time
from collections import deque

import msgspec
import zmq

from distkv import errors
from distkv.engine.client import OpenAnswers
from distkv.engine.protocol import (
    Abort,
    Accepted,
    Add,
    EngineInfo,
    EngineRequest,
    GetStats,
    Logged,
    Refused,
    ResetPrefixCache,
    Saving,
    Shutdown,
    StepOutput,
    Tokens,
    Traced,
    Working,
    decode_reply,
    encode,
)
from distkv.engine.stats import EngineStats
from distkv.errors import DistKVError, StoreError, WorkerDied
from distkv.launch.leader import lead
from distkv.launch.watchdog import Watchdog
from distkv.metrics.trace_file import TraceFile
from distkv.workers.group.log_lines import relay
from distkv.workers.group.private_socket import connect_private
from distkv.workers.group.ray_group import RayGroup

log = logging.getLogger(__name__)

STEP_WAIT = 10  # milliseconds that `step` waits for tokens
DEATH_POLL = 200  # milliseconds of silence after which the ranks are checked
REST = 1.0  # seconds after which an idle group is looked after
FINISH_TIMEOUT = 60.0  # seconds without progress after which ranks that are to save the cache and end are cut off
END_SECONDS = 10.0  # that ranks have to end beyond save_timeout, after which they are cut off
START_SECONDS = 900.0  # at least, for the first answer: nobody knows how long compiling takes
LAST_WORD = 1000  # milliseconds that a leader whose group has lost a rank gets to say how much is lost

Reply = Accepted | Refused | Tokens | EngineStats | Saving


class RayEngine:
    """Owns the group of actors and speaks to its leader. An `EngineClient`."""

    def __init__(
        self, group: RayGroup, info: EngineInfo, trace: TraceFile | None = None, hang_timeout: float = math.inf
    ):
        """Takes over a group whose pools are allocated and starts its engine; raises WorkerDied when a rank is lost,
        having released everything.

        Args:
            trace: gets what the ranks do, and is closed in the end.
            hang_timeout: see `EngineConfig`.
        """
        self.info = info
        self._group, self._trace = group, trace
        self._context = zmq.Context()
        self._unread: deque[list[StepOutput]] = deque()
        self._open = OpenAnswers()
        self._heard = 0.0  # monotonic time of the last message, or of the last look at the ranks
        self._watchdog = Watchdog(max(hang_timeout, START_SECONDS))
        self._closed = False
        try:
            group.start(lead, info, trace is not None)
            self._socket = self._connect()
            self.stats()  # the loops run
            self._watchdog = Watchdog(hang_timeout)
        except BaseException:
            self._end()
            raise

    def _connect(self) -> zmq.Socket:
        try:
            return connect_private(self._context, self._group.request_address)
        except DistKVError:
            self._group.check()  # which knows better why, if a rank has ended
            raise

    def add(self, requests: list[EngineRequest]) -> None:
        """See `EngineClient.add`."""
        self._send(Add(requests))
        reply = self._answer()
        if isinstance(reply, Refused):
            raise getattr(errors, reply.error)(reply.reason)
        self._open.add(requests)

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """See `EngineClient.abort`; nothing to do once the group has ended."""
        if not self._closed:
            self._send(Abort(answers, reason))
            self._open.close(answers)

    def step(self, wait: int = STEP_WAIT) -> list[StepOutput]:
        """See `EngineClient.step`: the group runs by itself, and this waits a moment, of so many milliseconds, for what
        it samples."""
        if not self._unread:
            reply = self._receive(wait)
            if reply is None:
                return []
            assert isinstance(reply, Tokens)
            self._unread.append(reply.outputs)
        outputs = self._unread.popleft()
        self._open.take(outputs)
        return outputs

    @property
    def socket(self) -> zmq.Socket:
        """Readable when `step` would not wait, unless `has_unread`."""
        return self._socket

    @property
    def has_unread(self) -> bool:
        """Whether outputs have come that `step` has not returned yet."""
        return bool(self._unread)

    @property
    def has_work(self) -> bool:
        """See `EngineClient.has_work`."""
        return bool(self._unread or self._open)

    def rest(self) -> float | None:
        """See `EngineClient.rest`: a rank may die while nobody waits for it."""
        if self._closed:
            return None
        reply = self._receive(0, checks=False)
        if isinstance(reply, Tokens):  # of answers that were aborted
            self._unread.append(reply.outputs)
        try:
            self._group.check()
        except Exception:
            try:
                self._send(Shutdown())
                self._tell_loss()
            finally:
                self._end()
            raise
        return REST

    def check_ready(self) -> None:
        """See `EngineClient.check_ready`: what ends this engine ends it for good."""

    def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        self._send(GetStats())
        reply = self._answer()
        assert isinstance(reply, EngineStats)
        return reply

    def reset_prefix_cache(self) -> None:
        """See `EngineClient.reset_prefix_cache`."""
        self._send(ResetPrefixCache())
        self._answer()

    def close(self) -> None:
        """Has the ranks save the cache and end, and releases what they held of the cluster.

        Raises WorkerDied when a rank has died, StoreError when they do not get on with saving. What is lost then is
        logged.
        """
        if self._closed:
            return
        try:
            self._send(Shutdown())
            self._await_end()
        finally:
            self._end()

    def _await_end(self) -> None:
        """Waits for the ranks as long as there is progress, and beyond save_timeout for a moment."""
        left, since = None, time.monotonic()
        timeout = self.info.save_timeout
        end = math.inf if timeout is None else since + timeout + END_SECONDS
        while True:
            try:
                if self._group.is_finished():
                    break
            except Exception:
                self._tell_loss(left)
                raise
            reply = self._receive(DEATH_POLL, checks=False)
            if isinstance(reply, Saving) and (left is None or reply.num_unsaved < left):
                left, since = reply.num_unsaved, time.monotonic()
            elif (now := time.monotonic()) > end or now - since > FINISH_TIMEOUT:
                number = "an unknown number of" if left is None else left or "no"
                what = f"have not ended {END_SECONDS:.0f} s after save_timeout, {timeout} s,"
                if now <= end:
                    what = f"did not get on with saving the cache, or with their end, for {FINISH_TIMEOUT:.0f} s"
                raise StoreError(f"the ranks {what} and were ended; {number} KV pages are missing on disk")
        while self._receive(0, checks=False) is not None:
            """What was logged is behind it."""

    def _tell_loss(self, left: int | None = None) -> None:
        """Logs how many pages a group takes along that was asked to end and has lost a rank."""
        deadline = time.monotonic() + LAST_WORD / 1e3
        while left is None and (wait := deadline - time.monotonic()) > 0:
            reply = self._receive(int(wait * 1e3), checks=False)
            left = reply.num_unsaved if isinstance(reply, Saving) else None
        if left or (left is None and self.info.fingerprint):
            log.warning("%s KV pages were not saved", "an unknown number of" if left is None else left)

    def _send(self, command: Add | Abort | GetStats | ResetPrefixCache | Shutdown) -> None:
        if self._closed:
            raise DistKVError("the engine has ended; make a new LLM")
        if not self._open:
            self._watchdog.begin()
        self._socket.send(encode(command))

    def _answer(self) -> Reply:
        """The answer to what was sent last; tokens that come before it are kept for `step`."""
        while True:
            reply = self._receive(DEATH_POLL)
            if isinstance(reply, Tokens):
                self._unread.append(reply.outputs)
            elif reply is not None:
                return reply

    def _receive(self, wait: int, checks: bool = True) -> Reply | None:
        """The next message, or None when none comes within `wait` milliseconds; raises WorkerDied when that is because
        a rank has ended, if it checks that. What ranks have logged is logged here."""
        while self._socket.poll(wait):
            self._heard = time.monotonic()
            self._watchdog.heard()
            reply = self._read()
            if isinstance(reply, Logged):
                relay(reply.lines)
            elif isinstance(reply, Working):
                continue
            elif isinstance(reply, Traced):
                assert self._trace is not None
                self._trace.write(reply.events)
            else:
                return reply
        if not checks:
            return None
        if time.monotonic() - self._heard >= DEATH_POLL / 1e3:
            self._check()
            self._heard = time.monotonic()
        return None

    def _read(self) -> Reply | Working | Logged | Traced:
        try:
            return decode_reply(self._socket.recv())
        except msgspec.MsgspecError as error:  # whatever it was, nothing is known of the engine any more
            self._end()
            raise WorkerDied(0, self._group.nodes[0].host, f"a message of it cannot be read ({error})") from error

    def _check(self) -> None:
        """Raises WorkerDied when a rank has ended or the ranks hang, having released everything."""
        try:
            self._group.check()
            if self._watchdog.is_hung():
                self._group.blame_for_hang(self._watchdog.silence)
        except Exception:
            self._end()
            raise

    def _end(self) -> None:
        self._closed = True
        try:
            self._context.destroy(linger=0)
        finally:
            if self._trace is not None:
                self._trace.close()
            self._group.close()
