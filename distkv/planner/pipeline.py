"""What a step takes whose stages work one after the other."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """Seconds of one micro-batch on the slowest rank of a stage, or between two stages."""

    parts: Mapping[str, float]  # what each thing takes by itself
    in_turn: Mapping[str, float]  # what they take that the others do not hide; the sum is what it takes

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(self.in_turn.values())


@dataclass(frozen=True)
class PipelineCost(StageCost):
    """Seconds of a step."""

    idle: float  # share of the time that a stage waits, over all stages


def num_micro_batches(stages: int, fixed: float, variable: float, most: int) -> int:
    """In which a step passes the stages: as many as make `(m + stages - 1) * (fixed + variable / m)` least, by the rule
    of the engine (`workers/micro_batches.py`), which has these from the model's sizes alone.

    Args:
        fixed: seconds that a micro-batch takes a stage however small it is; none, or less by rounding, where something
            else hides them.
        variable: seconds that all rows of a step take a stage beside that.
        most: pieces that the step can be cut into.
    """
    if fixed * most**2 <= (stages - 1) * variable:
        return most
    return max(1, round(math.sqrt((stages - 1) * variable / fixed)))


def run_stages(stages: Sequence[StageCost], between: Sequence[StageCost], micro_batches: int) -> PipelineCost:
    """One micro-batch passes all stages, and behind it comes one after the other out of the slowest: with p stages of t
    seconds each and m micro-batches a step takes (p + m - 1) t, of which a stage works m t and waits for (p - 1) t, the
    bubble. A step begins when the last one's tokens are known, so that bubbles of neighbouring steps do not fill each
    other.

    Args:
        between: what a micro-batch takes from each stage to the next, and from the last back to the first; none where
            there is one stage. Sends of later micro-batches are hidden behind the work of others.
    """
    slowest = max(stages, key=lambda one: one.seconds)
    path = [*stages, *[slowest] * (micro_batches - 1), *between]
    in_turn = _added(one.in_turn for one in path)
    seconds = sum(in_turn.values())
    works = sum(one.seconds for one in stages) * micro_batches / len(stages)
    idle = 1 - works / seconds if len(stages) > 1 else 0.0
    return PipelineCost(_added(one.parts for one in path), in_turn, idle)


def _added(spent: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in spent:
        for name, seconds in one.items():
            total[name] = total.get(name, 0.0) + seconds
    return total
