"""Runs a seed."""

import traceback
from collections import Counter
from dataclasses import dataclass

from simulation.cluster import ClusterRun
from simulation.local import LocalRun
from simulation.shape import CALM
from simulation.world import World


@dataclass(frozen=True)
class Outcome:
    """What came of a seed."""

    seed: int
    digest: str
    counts: Counter[str]
    num_tokens: int  # that were compared
    failure: str  # empty where all went well


def simulate(seed: int, num_plans: int, ends_at: int | None = None) -> Outcome:
    """Runs a seed until its ranks have run so many plans.

    Args:
        ends_at: the point at which the first process ends, where nothing else goes wrong: of an even seed.
    """
    world = World(seed)
    failure = ""
    run: LocalRun | ClusterRun = ClusterRun(world) if seed % 2 else LocalRun(world)
    if ends_at is not None:
        assert isinstance(run, LocalRun)
        run.faults, run.ends_at = CALM, ends_at
    try:
        run.run(num_plans)
    except (Exception, AssertionError):
        options = f"--plans {num_plans}" + (f" --ends-at {ends_at}" if ends_at is not None else "")
        failure = f"seed {seed} fails; PYTHONPATH=tests python -m simulation {seed} {options} runs it again\n"
        failure += traceback.format_exc()
    return Outcome(seed, world.digest, world.counts, run.callers.num_tokens, failure)
