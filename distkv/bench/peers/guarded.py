"""A process of another engine: started in a group of its own, talked to by lines, and killed with all its children."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

GUARD = Path(__file__).parent / "drivers" / "guard.py"
GRACE = 5.0  # seconds from SIGTERM to SIGKILL
LAST_WORDS = 400  # characters of what a process has written before it failed


class PeerFailed(Exception):
    """An engine could not be started, ended, answered nonsense or took too long; the text says which."""


class GuardedProcess:
    """Use it as a context manager: no process of the group is left behind it, nor behind this process's own end."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, *, is_talking: bool = True):
        """Starts a command, whose stderr goes to a file, and its stdout too unless it is to be talked to. Raises
        PeerFailed when there is no such program."""
        if not os.access(command[0], os.X_OK) or os.path.isdir(command[0]):
            raise PeerFailed(f"{command[0]!r} is no program that can be run; give the path of a Python interpreter")
        self._log = log
        lifeline, self._lifeline = os.pipe()
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(GUARD), str(lifeline), *command], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if is_talking else stderr, stderr=stderr, start_new_session=True,
                pass_fds=[lifeline], bufsize=0,
            )  # fmt: skip
        os.close(lifeline)
        self._unread = b""

    def ask(self, message: dict[str, Any], time_limit: float) -> dict[str, Any]:
        """Sends an object and returns the one that is answered within `time_limit` seconds. Raises PeerFailed."""
        deadline = time.monotonic() + time_limit
        try:
            self._write(json.dumps(message).encode() + b"\n", deadline, time_limit)
        except OSError:
            raise self._ended() from None
        return self.read(deadline - time.monotonic(), time_limit)

    def read(self, timeout: float, time_limit: float | None = None) -> dict[str, Any]:
        """The next object on its stdout, within `timeout` seconds; `time_limit` is what an error calls them. Raises
        PeerFailed."""
        line = self._read_line(time.monotonic() + timeout, timeout if time_limit is None else time_limit)
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise PeerFailed(f"it answered with {line[:80]!r}, which is no JSON object")
        if "error" in message:
            raise PeerFailed(str(message["error"]))
        return message

    @property
    def group(self) -> int:
        """Its process group."""
        return self._process.pid

    def check_alive(self) -> None:
        """Raises PeerFailed with the process's last words when it has ended."""
        if self._process.poll() is not None:
            raise self._ended()

    def _write(self, text: bytes, deadline: float, time_limit: float) -> None:
        """What a pipe does not hold is written when it is read; raises OSError when nobody can read it any more."""
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_WRITE)
            while text:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._late(time_limit)
                text = text[os.write(pipe, text) :]

    def _read_line(self, deadline: float, time_limit: float) -> str:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._late(time_limit)
                read = os.read(self._process.stdout.fileno(), 2**16)
                if not read:
                    raise self._ended()
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def _ended(self) -> PeerFailed:
        try:
            how = f"it ended with exit code {self._process.wait(GRACE)}"
        except subprocess.TimeoutExpired:
            how = "it has closed its stdout"
        return PeerFailed(f"{how}; {self._last_words()}")

    def _late(self, time_limit: float) -> PeerFailed:
        return PeerFailed(f"no answer within {time_limit:g} s, the time limit; {self._last_words()}")

    def _last_words(self) -> str:
        """The end of its stderr."""
        words = " ".join(self._log.read_bytes()[-LAST_WORDS:].decode(errors="replace").split())
        return f"its last words: {words}" if words else "it said nothing"

    def close(self) -> None:
        """Ends the group, by force where it does not end by itself."""
        try:
            if self._signal(signal.SIGTERM):
                deadline = time.monotonic() + GRACE
                while self._process.poll() is None or (self._signal(0) and time.monotonic() < deadline):
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(0.02)
        finally:
            self._signal(signal.SIGKILL)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.wait()
            os.close(self._lifeline)

    def _signal(self, number: int) -> bool:
        """Sends a signal to the group; returns whether there is anybody in it."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
