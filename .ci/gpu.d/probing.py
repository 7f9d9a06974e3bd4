"""Questions to a machine, of which none can stop the next: each answer is printed and written as it comes."""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the host enqueues what is measured


class Probes:
    """Answers by name, in a JSON file."""

    def __init__(self, path: Path):
        self._path = path
        self._answers: dict[str, Any] = {}
        self._failed: list[str] = []

    def ask(self, probe: Callable[[], Any], name: str | None = None) -> None:
        """The question's name is the probe's unless it has one of its own. What is lost with a run that is ended before
        its time is the question that it is at, so what takes long is asked in several."""
        if name is None:
            name = str(getattr(probe, "__name__", probe))
        start = time.perf_counter()
        try:
            answer = probe()
        except Exception as error:
            traceback.print_exc()
            answer = f"FAILED {type(error).__name__}: {error}"
            self._failed.append(name)
        self._answers[name] = answer
        lines = json.dumps(answer, indent=1, default=str)
        print(f"{name} ({time.perf_counter() - start:.1f} s): {lines}", flush=True)
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps(self._answers, indent=1, default=str))
        os.replace(part, self._path)

    def end(self) -> None:
        """Exits with 1 when a probe has failed; the last line says which was the first."""
        if self._failed:
            first = f"{self._failed[0]}: {self._answers[self._failed[0]]}"
            sys.exit(f"{len(self._failed)} of {len(self._answers)} failed; {first}"[:300].replace("\n", " "))


def seconds(work: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> float:
    """The median by events of the device, which sleeps until the host has enqueued the work; what the cache holds of
    the turn before stays there."""
    for _ in range(warm_up):
        work()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def host_seconds(work: Callable[[], object], repeats: int = 2000) -> float:
    """What it costs the host to enqueue some work, once."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    taken = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return taken


def gigabytes(num_bytes: int, taken: float) -> float:
    """Per second."""
    return round(num_bytes / taken / 1e9, 2)
