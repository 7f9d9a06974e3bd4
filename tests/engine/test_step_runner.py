"""What ranks report is booked, whatever else comes of it."""

import threading
from contextlib import closing
from typing import Any

import pytest
from support.memory import engine_info

from distkv.engine import step_runner
from distkv.engine.engine import Engine
from distkv.engine.step_runner import StepRunner
from distkv.errors import StoreError
from distkv.storage.disk.catalogue import Entry
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import page_key
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import HOST
from distkv.workers.group.executor import StepResult
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan


class MissingPages:
    """Ranks of nodes that do not see each other's disks; what was to be moved before has been moved."""

    def __init__(self, done: list[int]):
        self.done = done

    def warm_up(self) -> None:
        pass

    def run(self, plan: StepPlan, rows: list[Any]) -> StepResult:
        return StepResult(Report(done=self.done, missing=list(plan.added)))


class NoCatalogue:
    def update(self, changes: Any, checksums: dict[int, bytes]) -> None:
        pass

    def close(self) -> None:
        pass


def test_pages_that_are_missing_leave_the_rest_of_the_report() -> None:
    cache = TieredCache((4, 4, 4), 1, False, None)
    table = PageTable(cache, 16, b"")
    assert cache.reserve(1)
    [page] = table.append(16)
    table.commit(16, [page_key(b"root", list(range(16)))])
    cache.balance()
    [transfer] = cache.take_transfers()[0]
    executor: Any = MissingPages([transfer.id])
    with closing(StepRunner(engine_info(), executor, cache)) as runner:
        catalogue: Any = NoCatalogue()
        runner._catalogue_writer = catalogue
        with pytest.raises(StoreError, match=r"1 of 1 pages are not where all ranks look .* use a cache_dir that all"):
            runner.take_in_pages([Entry(2, b"key", b"root", b"", b"", 0.0, 0)], lambda entry: None)
    assert not cache.awaited and page.has(HOST)
    cache.integrity_check()


@pytest.mark.parametrize("call", ["step", "run", "draft"])
def test_whatever_takes_long_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A page that is computed again, or a draft, may take as long as a step."""
    told = threading.Event()

    class Slow:
        def warm_up(self) -> None:
            pass

        def run(self, plan: StepPlan, rows: list[Any]) -> StepResult:
            assert told.wait(60)
            return StepResult(Report())

        def draft(self, requests: list[Any]) -> list[list[int]]:
            assert told.wait(60)
            return []

    monkeypatch.setattr(step_runner, "WAITING_SECONDS", 1e-3)
    executor: Any = Slow()
    with closing(Engine(engine_info(), executor, waiting=told.set)) as engine:
        runner, plan = engine._runner, StepPlan([], [], [])
        match call:
            case "step":
                assert runner.wait(runner.start(plan, [])).error is None
            case "run":
                assert runner.run(plan) == set()
            case "draft":
                assert runner.draft([]) == []
