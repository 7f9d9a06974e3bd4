"""A clock that stands still, in the place of a GPU's."""

import io

import torch
from rich.console import Console

from distkv.bench.device import DeviceMeter, Turns, Work
from distkv.bench.harness import Bench
from distkv.bench.options import BenchOptions


class FakeMeter(DeviceMeter):
    """Runs the work on a CPU and says that it took a millisecond, of a second work at once two."""

    def __init__(self, free_bytes: int = 2**60):
        self.processors = 4
        self.order: list[Work] = []  # of what was timed
        self._peak = 0
        self._free_bytes = free_bytes

    def seconds(self, work: Work) -> float:
        self.order.append(work)
        work()
        return 1e-3

    def seconds_each(self, works: tuple[Work, Work]) -> tuple[float, float]:
        for work in works:
            self.seconds(work)
        return 1e-3, 2e-3

    def forget_peak(self) -> None:
        self._peak += 1000

    def peak_bytes(self) -> int:
        return self._peak

    def free_bytes(self) -> int:
        return self._free_bytes


def fake_turns(repeats: int = 1, **options: int) -> Turns:
    """On a CPU, with such a clock; `options` are of `FakeMeter`."""
    bench = Bench("fake", BenchOptions(repeats=repeats), console=Console(file=io.StringIO()))
    return Turns(FakeMeter(**options), torch.device("cpu"), bench)
