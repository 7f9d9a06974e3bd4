"""The process that owns an engine, as who tries faults sees it."""

import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from reliability.load import Load, Request
from reliability.our_processes import Family
from support.processes import ROOT, TESTS

DRIVER = Path(__file__).with_name("driver.py")


class Hung(Exception):
    """Nothing came within the limit."""


class Gone(Exception):
    """The process has ended though nobody told it to."""


class StartFailed(Exception):
    """The engine could not be made."""


class DriverProcess:
    """See `driver.py`. Whatever waits for it raises Hung after `limit` seconds in which it has said nothing, and Gone
    when it has ended."""

    def __init__(
        self,
        folder: Path,
        family: Family,
        limit: float,
        prelude: str = "",
        environment: dict[str, str] | None = None,
        limits: dict[int, int] | None = None,
    ):
        """
        Args:
            folder: becomes HOME, and gets what the process says on stderr (`driver.log`).
            prelude: Python that the process runs first.
            limits: of resources, as `resource.setrlimit` takes them, soft and hard.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "driver.log"
        self._family, self.limit = family, limit
        self._loads: list[Load] = []
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        command = [sys.executable, str(DRIVER)]
        if prelude:
            (folder / "prelude.py").write_text(prelude)
            command.append(str(folder / "prelude.py"))

        def confine() -> None:
            for what, value in (limits or {}).items():
                resource.setrlimit(what, (value, value))

        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        paths = os.pathsep.join([str(ROOT), str(TESTS)])
        own = {"PYTHONPATH": paths, "HOME": str(folder), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
                start_new_session=True, preexec_fn=confine if limits else None,
                env=os.environ | own | family.environment | (environment or {}),
            )  # fmt: skip
        family.sessions.add(self.process.pid)
        threading.Thread(target=self._read, daemon=True).start()
        self._await("ready")

    def start(self, model: Path, options: dict[str, Any]) -> float:
        """Makes the engine; returns the seconds that took. Raises StartFailed."""
        self.tell("start", model=str(model), options=options)
        return self.await_start()

    def await_start(self) -> float:
        """Waits for an engine that was told to start; as `start`."""
        event = self._await("started", "start_failed")
        if event["event"] == "start_failed":
            raise StartFailed(event["error"])
        return event["seconds"]

    def ask(self, requests: list[Request], salt: str | None = None) -> Load:
        """Begins requests, which run side by side."""
        load = Load(requests)
        self._loads.append(load)
        for request in requests:
            self.tell("ask", request=load.name_of(request), prompt=request.prompt, params=request.params, salt=salt)
        return load

    def listen(self, until: Callable[[], bool], seconds: float | None = None) -> bool:
        """Takes in what comes of loads until something holds; False when it does not after so many seconds."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not until():
            wait = self.limit if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self._take(wait)
            except Hung:
                if deadline is None:
                    raise
                return until()
        return True

    def finish(self, load: Load) -> None:
        """Takes in what comes until all requests of a load have ended."""
        self.listen(lambda: load.is_done)

    def stats(self) -> dict[str, Any]:
        """See `Driver.stats`."""
        self.tell("stats")
        return self._await("stats")

    def inspect(self, address: str) -> dict[str, Any]:
        """See `Driver.inspect`."""
        self.tell("inspect", address=address)
        told = self._await("inspected")
        return {name: told[name] for name in ("groups", "cpus_taken")}

    def close(self) -> str | None:
        """Closes the engine; returns the error that this raised."""
        self.tell("close")
        return self.await_close()

    def await_close(self) -> str | None:
        """Waits for an engine that was told to close; as `close`."""
        return self._await("closed")["error"]

    def tell(self, command: str, **what: Any) -> None:
        """Sends a command, to a process that may be gone."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # which shows when its answer is waited for
            self.process.stdin.write(json.dumps({"do": command, **what}) + "\n")
            self.process.stdin.flush()

    def end(self) -> int:
        """Has the process end by itself; returns its exit status. Raises Hung."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(self.limit)
        except subprocess.TimeoutExpired:
            raise Hung("the driver did not end") from None

    def kill(self) -> None:
        """Ends the process with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put({"at": time.monotonic(), **json.loads(line)})
        self._events.put(None)

    def _await(self, *names: str) -> dict[str, Any]:
        """The next event of one of these names."""
        while (event := self._take(self.limit)) is None or event["event"] not in names:
            """What comes of loads."""
        return event

    def _take(self, wait: float) -> dict[str, Any] | None:
        """Waits for an event; gives it to the load that it is of, or else returns it."""
        try:
            event = self._events.get(timeout=wait)
        except queue.Empty:
            raise Hung(f"nothing came of the driver for {wait:.0f} s") from None
        if event is None:
            self._events.put(None)
            raise Gone(f"the driver has ended with status {self.process.wait()}")
        if event["event"] not in ("tokens", "ended"):
            return event
        for load in self._loads:
            load.take(event)
        return None
