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
    ImportedPages,
    ImportPages,
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
from distkv.workers.group.drain_watch import Notice
from distkv.workers.group.log_lines import relay
from distkv.workers.group.private_socket import connect_private, decoded
from distkv.workers.group.ray_group import RayGroup

log = logging.getLogger(__name__)

STEP_WAIT = 10  # milliseconds that `step` waits for tokens
DEATH_POLL = 200  # milliseconds of silence after which the ranks are checked
REST = 1.0  # seconds after which an idle group is looked after
FINISH_TIMEOUT = 60.0  # seconds without progress after which ranks that are to save the cache and end are cut off
END_SECONDS = 10.0  # that ranks have to end beyond the time for saving, after which they are cut off
LEAVE_SECONDS = 30.0  # before a node goes, at which its engine ends; half of the time that there is, if that is less
LEAVE_MARGIN = 3.0  # seconds by which all is to be saved before that
START_SECONDS = 900.0  # at least, for the first answer: nobody knows how long compiling takes
LAST_WORD = 1000  # milliseconds that a leader whose group has lost a rank gets to say how much is lost

Reply = Accepted | Refused | ImportedPages | Tokens | EngineStats | Saving


class RayEngine:
    """Owns the group of actors and speaks to its leader. An `EngineClient`."""

    def __init__(
        self,
        group: RayGroup,
        info: EngineInfo,
        trace: TraceFile | None = None,
        hang_timeout: float = math.inf,
        leaves: bool = True,
    ):
        """Takes over a group whose pools are allocated and starts its engine; raises WorkerDied when a rank is lost,
        or the DistKVError that one has ended with, having released everything.

        Args:
            trace: gets what the ranks do, and is closed in the end.
            hang_timeout: see `EngineConfig`.
            leaves: it saves its pages and ends by itself before one of its nodes goes, as if a rank were lost; else
                whoever owns it looks at `notice` and `has_to_leave`, and closes it.
        """
        self._leaves = leaves
        self.info = info
        self._group, self._trace = group, trace
        self._context = zmq.Context()
        self._unread: deque[list[StepOutput]] = deque()
        self._open = OpenAnswers()
        self._heard = 0.0  # monotonic time of the last message, or of the last look at the ranks
        self._worked = 0.0  # monotonic time when the ranks were last said to go on
        self._watchdog = Watchdog(max(hang_timeout, START_SECONDS))
        self._starts, self._closed = True, False
        try:
            group.start(lead, info, trace is not None)
            self._socket = self._connect()
            self.stats()  # the loops run
            self._watchdog = Watchdog(hang_timeout)
            self._starts = False
        except BaseException as error:
            self._end()
            if isinstance(error, WorkerDied) and isinstance(error.__cause__, DistKVError):
                raise error.__cause__ from None  # a rank knows why the engine cannot start
            raise

    def _connect(self) -> zmq.Socket:
        try:
            return connect_private(self._context, self._group.request_address)
        except DistKVError:
            self._group.check()  # which knows better why, if a rank has ended
            raise

    def add(self, requests: list[EngineRequest]) -> None:
        """See `EngineClient.add`."""
        self._ask(Add(requests))
        self._open.add(requests)

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        """See `EngineClient.abort`; nothing to do once the group has ended."""
        if not self._closed:
            self._send(Abort(answers, reason))
            self._open.close(answers)

    def step(self, wait: int = STEP_WAIT) -> list[StepOutput]:
        """See `EngineClient.step`: the group runs by itself, and this waits a moment, of so many milliseconds, for what
        it samples."""
        self._leave_in_time()
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
        self._leave_in_time()
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
        reply = self._ask(GetStats())
        assert isinstance(reply, EngineStats)
        return reply

    def reset_prefix_cache(self) -> None:
        """See `EngineClient.reset_prefix_cache`."""
        self._ask(ResetPrefixCache())

    def import_pages(self, path: str, cache_salt: str | None, start: int) -> tuple[int, int]:
        """See `EngineClient.import_pages`; the file is read on the node of the first rank."""
        reply = self._ask(ImportPages(path, cache_salt, start))
        assert isinstance(reply, ImportedPages)
        return reply.end, reply.num_new

    @property
    def notice(self) -> Notice | None:
        """That one of its nodes is about to go, if the cluster says so."""
        return self._group.notice

    @property
    def has_to_leave(self) -> bool:
        """Whether it must end now if its pages are to be saved before one of its nodes goes."""
        notice = self.notice
        if notice is None:
            return False
        return notice.seconds_left <= min(LEAVE_SECONDS, (notice.end - notice.seen) / 2)

    def _leave_in_time(self) -> None:
        """Ends before one of the nodes goes, and raises WorkerDied for that."""
        notice = self.notice
        if self._leaves and notice is not None and self.has_to_leave:
            rank = self._group.rank_on(notice.node_id)
            cause = f"Ray drains the node, which goes in {notice.seconds_left:.0f} s, and the cache was saved before"
            try:
                self.close()
            except (WorkerDied, StoreError) as error:
                cause = f"Ray drains the node, and the cache could not be saved: {error}"
            raise WorkerDied(rank, self._group.nodes[rank].host, cause)

    def close(self) -> None:
        """Has the ranks save the cache and end, and releases what they held of the cluster.

        Raises WorkerDied when a rank has died, StoreError when they do not get on with saving. What is lost then is
        logged.
        """
        if self._closed:
            return
        notice = self.notice  # which another thread may take back
        timeout = self._save_timeout(notice)
        if not self._open:
            self._watchdog.begin()
        try:
            self._send(Shutdown(timeout))
            self._await_end(timeout, math.inf if notice is None else notice.end + END_SECONDS)
        finally:
            self._end()

    def _save_timeout(self, notice: Notice | None) -> float | None:
        """Seconds that the ranks have to save the cache."""
        timeout = self.info.save_timeout
        if notice is not None and notice.end < math.inf:
            left = max(1.0, notice.seconds_left - LEAVE_MARGIN)
            timeout = left if timeout is None else min(timeout, left)
        return timeout

    def _await_end(self, timeout: float | None, gone: float) -> None:
        """Waits for the ranks as long as there is progress, and beyond their time for a moment. They look at what they
        are asked for between two steps, so until they begin to save they may be silent as in any step; but a node that
        goes, at the monotonic time `gone`, waits for nobody."""
        left, since, begun = None, time.monotonic(), math.inf
        silence = self._watchdog.longest if self._open else 0.0  # as in the last step, which may have begun before
        while True:
            try:
                if self._group.is_finished():
                    break
                if begun == math.inf:
                    self._check_hung()
            except Exception:
                self._tell_loss(left)
                raise
            reply = self._receive(DEATH_POLL, checks=False)
            now = time.monotonic()
            if isinstance(reply, Saving) and (left is None or reply.num_unsaved < left):
                left, since, begun = reply.num_unsaved, now, min(begun, now)
                continue
            is_late = timeout is not None and now - max(begun, self._worked) > timeout + END_SECONDS + silence
            is_stuck = begun < math.inf and now - max(since, self._worked) > FINISH_TIMEOUT + silence
            if now > gone or is_late or is_stuck:
                number = "an unknown number of" if left is None else left or "no"
                what = f"did not get on with saving the cache, or with their end, for {now - since:.0f} s"
                if not is_stuck and timeout is not None:
                    what = (
                        f"have not ended {END_SECONDS:.0f} s after the {timeout:.0f} s that they had to save the cache"
                    )
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

    def _ask(self, command: Add | GetStats | ResetPrefixCache | ImportPages) -> Reply:
        """The answer to a command; tokens that come before it are kept for `step`. Raises the error that a command is
        refused with, and WorkerDied when a rank has ended."""
        if self._closed:
            raise DistKVError("the engine has ended; make a new LLM")
        if not self._open:
            self._watchdog.begin()
        while not self._send(command):
            self._check()
            self._socket.poll(DEATH_POLL, zmq.POLLOUT)
        while True:
            reply = self._receive(DEATH_POLL)
            if isinstance(reply, Tokens):
                self._unread.append(reply.outputs)
            elif isinstance(reply, Refused):
                raise getattr(errors, reply.error)(reply.reason)
            elif reply is not None:
                return reply

    def _send(self, command: Add | Abort | GetStats | ResetPrefixCache | ImportPages | Shutdown) -> bool:
        """Sends a command, unless the leader's end of the connection is no more: then its process has ended, which the
        group says a moment later. Only a peer can be written to, and always; without one the socket would wait."""
        try:
            self._socket.send(encode(command), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self, wait: int, checks: bool = True) -> Reply | None:
        """The next message, or None when none comes within `wait` milliseconds; raises WorkerDied when that is because
        a rank has ended, if it checks that. What ranks have logged is logged here."""
        deadline = time.monotonic() + wait / 1e3
        while self._socket.poll(max(0, round((deadline - time.monotonic()) * 1e3))):
            self._heard = time.monotonic()
            self._watchdog.heard()
            reply = self._read()
            if isinstance(reply, Logged):
                relay(reply.lines)
            elif isinstance(reply, Working):
                self._worked = self._heard
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
            return decoded(decode_reply, self._socket.recv())
        except msgspec.MsgspecError as error:  # whatever it was, nothing is known of the engine any more
            self._end()
            raise WorkerDied(0, self._group.nodes[0].host, f"a message of it cannot be read ({error})") from error

    def _check(self) -> None:
        """Raises WorkerDied when a rank has ended or the ranks hang, having released everything."""
        try:
            self._group.check()
            if self._starts:
                self._group.check_stopped()
            self._check_hung()
        except Exception:
            self._end()
            raise

    def _check_hung(self) -> None:
        """Raises WorkerDied when the ranks hang."""
        if self._watchdog.is_hung():
            self._group.blame_for_hang(self._watchdog.silence)

    def _end(self) -> None:
        self._closed = True
        try:
            self._context.destroy(linger=0)
        finally:
            if self._trace is not None:
                self._trace.close()
            self._group.close()
