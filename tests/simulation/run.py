"""Runs a seed."""

import traceback
from collections import Counter
from dataclasses import dataclass

from simulation.cluster import ClusterRun
from simulation.local import LocalRun
from simulation.world import World


@dataclass(frozen=True)
class Outcome:
    """What came of a seed."""

    seed: int
    digest: str
    counts: Counter[str]
    num_tokens: int  # that were compared
    failure: str  # empty where all went well


def simulate(seed: int, num_plans: int) -> Outcome:
    """Runs a seed until its ranks have run so many plans."""
    world = World(seed)
    failure = ""
    run = (LocalRun, ClusterRun)[seed % 2](world)
    try:
        run.run(num_plans)
    except (Exception, AssertionError):
        failure = f"seed {seed} fails; PYTHONPATH=tests python -m simulation {seed} --plans {num_plans} runs it again\n"
        failure += traceback.format_exc()
    return Outcome(seed, world.digest, world.counts, run.callers.num_tokens, failure)
