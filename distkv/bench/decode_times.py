"""How long decode steps take, by how many sequences they run."""

import time
from dataclasses import dataclass, field

from distkv.engine.observer import StepObserver
from distkv.engine.step import Step


@dataclass(frozen=True)
class DecodeStep:
    """A step that ran one token of each of its sequences."""

    batch: int
    seconds: float


@dataclass
class DecodeTimes(StepObserver):
    """Takes down the decode steps of an engine. The time of one is that since the ranks reported on the step before."""

    decode_steps: list[DecodeStep] = field(default_factory=list)
    _reported_at: float = 0.0

    def reported(self, step: Step) -> None:
        now = time.perf_counter()
        if self._reported_at and all(work.num_tokens == 1 for work in step.work):
            self.decode_steps.append(DecodeStep(len(step.work), now - self._reported_at))
        self._reported_at = now
