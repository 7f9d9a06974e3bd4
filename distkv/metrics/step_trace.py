"""What each step does, on the leader and on all ranks, as the events of a trace."""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from distkv.engine.observer import StepObserver
from distkv.engine.protocol import StepOutput
from distkv.engine.step import Step
from distkv.storage.meter import Span

NAMES = {
    "device_to_host": "spill page",
    "host_to_device": "fetch page",
    "host_to_disk": "save page",
    "disk_to_host": "load page",
    "host_streamed": "fetch slices from host",
    "host_attended": "attend on the host",
    "disk_streamed": "fetch slices from disk",
    "disk_read": "disk read",
    "disk_write": "disk write",
    "stage_step": "step of the stage",
    "stage_wait": "wait for another stage",
    "micro_batch": "micro-batch",
}
"""Of the kinds of work in `meter.py` that have another one there."""

LEADER = 0  # its process in the trace; rank n is process n + 1


class StepTrace(StepObserver):
    """Makes events of the stages of steps and of the spans that ranks report, and writes them after each step."""

    def __init__(self, write: Callable[[bytes], None], close: Callable[[], None] = lambda: None):
        """
        Args:
            write: takes events as `TraceFile.write` does.
            close: called when the engine is closed, behind the last events.
        """
        self._write, self._close = write, close
        self._begin = self._last = time.time_ns()
        self._number = 0  # of the step that was started last
        self._events: list[bytes] = []
        self._tracks: dict[tuple[int, str], int] = {}

    def begun(self) -> None:
        self._last = time.time_ns()

    def prepared(self, step: Step | None) -> None:
        self._stage("prepare", {"step": self._number + 1})

    def reported(self, step: Step) -> None:
        self._stage("wait for ranks", {"step": self._number})

    def completed(self, step: Step) -> None:
        self._stage("book", {"step": self._number})

    def started(self, step: Step) -> None:
        self._number += 1
        self._stage("start", {"step": self._number, "sequences": len(step.work)})

    def emitted(self, outputs: list[StepOutput]) -> None:
        self._stage("read tokens", {"outputs": len(outputs)})
        self._flush()

    def measured(self, spans: list[Span]) -> None:
        for span in spans:
            name = NAMES.get(span.kind, span.kind)
            self._add(span.rank + 1, span.track, name, span.start, span.duration, span.details)

    def closed(self) -> None:
        self._flush()
        self._close()

    def _stage(self, name: str, details: dict[str, int]) -> None:
        now = time.time_ns()
        self._add(LEADER, "engine", name, self._last, now - self._last, details)
        self._last = now

    def _add(self, process: int, track: str, name: str, start: int, duration: int, details: dict[str, int]) -> None:
        thread = self._tracks.get((process, track)) or self._new_track(process, track)
        self._event(
            name, "X", process, thread, details, ts=(start - self._begin) / 1e3, dur=duration / 1e3
        )  # microseconds

    def _new_track(self, process: int, track: str) -> int:
        if all(process != other for other, _ in self._tracks):
            name = "leader" if process == LEADER else f"rank {process - 1}"
            self._event("process_name", "M", process, 0, {"name": name})
            self._event("process_sort_index", "M", process, 0, {"sort_index": process})
        thread = self._tracks[process, track] = len(self._tracks) + 1
        self._event("thread_name", "M", process, thread, {"name": track})
        return thread

    def _event(self, name: str, phase: str, process: int, thread: int, details: dict[str, Any], **more: float) -> None:
        event = {"name": name, "ph": phase, "pid": process, "tid": thread, **more, "args": details}
        self._events.append(msgspec.json.encode(event))

    def _flush(self) -> None:
        if self._events:
            self._write(b",\n".join(self._events))
            self._events.clear()
