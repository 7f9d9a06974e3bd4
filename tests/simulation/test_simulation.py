"""The engine, its tiers and its scheduler on simulated ranks and disks: answers are those of a model without a cache,
whatever happens; see `docs/reliability.md`."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
from simulation.mutations import MUTATIONS
from simulation.run import Outcome, simulate
from support.processes import run_python

SEEDS, PLANS = 40, 200  # of the default suite
MANY_PLANS, PLANS_PER_SEED = 1_000_000, 500  # of the slow one


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What the engine logs of faults would be many lines."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def all_well(outcomes: list[Outcome]) -> Counter[str]:
    """What has happened in all of them; fails with the first that failed."""
    total: Counter[str] = Counter()
    for outcome in outcomes:
        assert not outcome.failure, outcome.failure
        total += outcome.counts
    total["tokens"] = sum(outcome.num_tokens for outcome in outcomes)
    return total


def check_variety(total: Counter[str]) -> None:
    """A simulation in which nothing happens finds nothing."""
    for what in (
        "device_to_host", "host_to_device", "host_to_disk", "disk_to_host", "host_to_disk failed",
        "disk_to_host failed", "page streamed from disk", "wrong checksum", "disk full", "catalogue locked",
        "pages in catalogues", "aborted", "idle checks", "killed at: before a plan", "killed at: before the report",
        "killed at: transfers are under way", "step fault: reported",
    ):  # fmt: skip
        assert total[what], f"there was no {what!r}: {total}"


def test_answers_are_those_of_a_model_without_a_cache() -> None:
    total = all_well([simulate(seed, PLANS) for seed in range(SEEDS)])
    check_variety(total)
    assert total["plans"] >= SEEDS * PLANS and total["tokens"] > 5000


def test_a_seed_is_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process whose hashes are others."""
    code = "from simulation.run import simulate; print(*(simulate(seed, 100).digest for seed in range(8)))"
    here = [simulate(seed, 100).digest for seed in range(8)]
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        assert run_python(code).split() == here
    assert len(set(here)) == 8


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_broken_is_found(name: str) -> None:
    for seed in range(100):
        with MUTATIONS[name]():
            if simulate(seed, 150).failure:
                return
    pytest.fail(f"the simulation does not notice that {name}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_steps() -> None:
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        seeds = range(1_000_000, 1_000_000 + MANY_PLANS // PLANS_PER_SEED)
        total = all_well(list(processes.map(partial(simulate, num_plans=PLANS_PER_SEED), seeds, chunksize=8)))
    check_variety(total)
    assert total["plans"] >= MANY_PLANS
