"""Whom the cold budget lets run, case by case: sequences whose pages lie where a test puts them."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pytest
from support.history import GREEDY
from support.memory import PAGE_SIZE, engine_info

from distkv.engine.cold_budget import DOUBT_STEPS, REVIEW_STEPS, TURN_STEPS, ColdBudget
from distkv.engine.protocol import EngineRequest
from distkv.engine.sequence import Sequence
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.tier import Tier

LIMIT = 10  # pages of the host


class Cache:
    """What the budget asks of a `TieredCache`, and what it tells it."""

    has_cold = True

    def __init__(self) -> None:
        self.parked: set[Page] = set()

    def park(self, pages: Iterable[Page]) -> None:
        self.parked |= set(pages)

    def unpark(self, pages: Iterable[Page]) -> None:
        self.parked -= set(pages)


class Line:
    """Running sequences under a budget."""

    def __init__(self, limit: int = LIMIT, disk_cost: float = 1.0, policy: str = "full"):
        self.cache: Any = Cache()
        info = engine_info(
            max_cold_bytes_per_step=1000 * limit, page_bytes=1000, disk_cost=disk_cost, attention_policy=policy
        )
        self.budget = ColdBudget(info, self.cache)
        self.running: list[Sequence] = []

    def add(self, pages: list[Page], priority: int = 0) -> Sequence:
        """A sequence that comes last."""
        number = self.running[-1].number + 1 if self.running else 0
        table = PageTable(self.cache, PAGE_SIZE)
        table.pages = pages
        request = EngineRequest(str(number), [5] * PAGE_SIZE, GREEDY, 10, 0, priority=priority)
        self.running.append(Sequence(request, 0, number, table, [5] * PAGE_SIZE, None))
        return self.running[-1]

    def step(self, count: int = 1) -> list[int]:
        """Who runs after so many steps; `park` was told of those who do not."""
        for _ in range(count):
            self.budget.review(self.running)
        waiting = {page for one in self.running if one.is_parked for page in one.table.pages}
        active = {page for one in self.running if not one.is_parked for page in one.table.pages}
        assert waiting - active <= self.cache.parked <= waiting
        return [one.number for one in self.running if not one.is_parked]


def pages(host: int = 0, disk: int = 0, device: int = 0) -> list[Page]:
    """Full pages that lie in one tier each."""
    found = [Page(index, full=True) for index in range(host + disk + device)]
    put(found, host, disk)
    return found


def put(pages: list[Page], host: int, disk: int = 0) -> None:
    """Moves the first of a sequence's pages to these tiers, and the others to the device."""
    for index, page in enumerate(pages):
        tier = Tier.HOST if index < host else Tier.DISK if index < host + disk else Tier.DEVICE
        page.slots = [index if one is tier else None for one in Tier]


def test_what_fits_beside_the_first_runs() -> None:
    line = Line()
    for host in (6, 5, 4, 1, 0):
        line.add(pages(host, device=3))
    assert line.step() == [0, 2, 4], "to the last page of the limit"


def test_the_first_runs_whatever_it_streams() -> None:
    line = Line()
    first = line.add(pages(2 * LIMIT))
    line.add(pages(2 * LIMIT))
    line.add(pages(1))
    line.add(pages(device=3))
    assert line.step() == [0, 3], "and so does who streams nothing"
    line.running.remove(first)
    assert line.step() == [1, 3], "at once"


def test_a_page_is_streamed_once_for_all_who_share_it() -> None:
    line, shared = Line(), pages(6)
    for own in (2, 2, 1, 0):
        line.add(shared + pages(own))
    assert line.step() == [0, 1, 3]


def test_those_that_share_their_pages_with_the_first_run_beside_it_whatever_it_streams() -> None:
    line = Line()
    book = pages(host=4 * LIMIT)
    for own in (0, 3, 4, 4, 0):
        line.add(book + pages(host=own, device=1))
    line.add(pages(host=1))
    assert line.step() == [0, 1, 2, 4], "as long as those of their own are a quarter of its pages"
    line = Line()
    for shared, own in ((4 * LIMIT, 0), (16, 4), (16, 5)):
        line.add(book[:shared] + pages(host=own))
    assert line.step() == [0, 1], "and a quarter of what each shares"


def test_a_page_on_disk_costs_what_the_disk_costs() -> None:
    line = Line(disk_cost=3.0)
    for cold in (pages(host=1, disk=2), pages(host=1, disk=1), pages(disk=1), pages(host=1)):
        line.add(cold)
    assert line.step() == [0, 2]
    line = Line(disk_cost=3.0)
    line.add(pages(host=LIMIT - 1))
    [both] = line.add(pages(disk=1)).table.pages
    assert line.step() == [0]
    both.slots[Tier.HOST] = 0  # it is read from there now
    assert line.step(REVIEW_STEPS) == [0]
    line.running[0].table.pages.pop()
    assert line.step(REVIEW_STEPS) == [0, 1]


def test_a_policy_streams_its_share_of_the_cold_pages() -> None:
    """Once an answer is being written: a prompt is read with attention to everything. Who chooses a page that others
    choose too may have chosen other ones in another layer, so each counts."""
    line, shared = Line(disk_cost=2.0, policy="top_pages(share=0.25)"), pages(host=8, device=8)
    for own in (shared, pages(disk=8, device=8), shared, shared):
        one = line.add(own)
        one.table.num_tokens = one.num_to_read
    assert line.step() == [0, 1, 2, 3], "2 + 4 + 2 + 2 of 10"
    line.add(pages(host=1))
    assert line.step() == [0, 1, 2, 3], "that of a prompt is one more"
    line.running[0].table.num_tokens = 0  # as if it had been preempted: 8, which serve the others too, and 1
    assert line.step(REVIEW_STEPS) == [0, 2, 3, 4]


@pytest.mark.parametrize("priorities, expected", [((0, 0, 0), 0), ((1, 0, 0), 1), ((1, 1, 0), 2)])
def test_the_order_is_that_of_priority_then_of_arrival(priorities: tuple[int, ...], expected: int) -> None:
    line = Line()
    for priority in priorities:
        line.add(pages(8), priority)
    assert line.step() == [expected]
    line.running.reverse()  # as when one was admitted late, since it waited for another's prefix
    assert line.step() == [expected]


def test_one_that_waits_comes_back_at_nine_tenths_of_the_limit() -> None:
    """And one that runs goes on up to the whole of it, so that the choice does not flicker."""
    line = Line()
    line.add(pages(5))
    other = line.add(pages(6))
    assert line.step() == [0]
    for host, runs in ((5, [0]), (4, [0, 1]), (5, [0, 1]), (6, [0])):
        put(other.table.pages, host)
        assert line.step(REVIEW_STEPS) == runs, host


def test_a_turn_ends_where_somebody_waits() -> None:
    """Then the one that had it goes behind all others, and one that comes new does not go before those that wait."""
    line = Line()
    line.add(pages(8))
    line.add(pages(8))
    turns = [line.step()[0] for _ in range(TURN_STEPS + REVIEW_STEPS)]
    assert turns[-1] == 1
    line.add(pages(8))
    turns += [line.step()[0] for _ in range(6 * TURN_STEPS)]
    lengths = [(who, len(list(steps))) for who, steps in groupby(turns)]
    assert [who for who, _ in lengths[:7]] == [0, 1, 0, 2, 1, 0, 2]
    for _, length in lengths[:6]:
        assert TURN_STEPS <= length < TURN_STEPS + REVIEW_STEPS


def test_those_that_all_fit_take_no_turns() -> None:
    line = Line()
    for _ in range(2):
        line.add(pages(5))
    for _ in range(3 * TURN_STEPS):
        assert line.step() == [0, 1]
    assert {one.turn for one in line.running} == {0}


def test_a_review_comes_now_and_then() -> None:
    """Not when pages have moved a little, so that it costs next to nothing."""
    line = Line()
    line.add(pages(6))
    other = line.add(pages(5))
    assert line.step() == [0] and line.budget.is_steady
    put(other.table.pages, 1)
    for _ in range(REVIEW_STEPS - 1):
        assert line.step() == [0] and not line.budget.is_steady
    assert line.step() == [0, 1] and line.budget.is_steady
    put(other.table.pages, 5)
    assert line.step() == [0, 1] and line.budget.is_steady, "nobody waits"


@pytest.mark.parametrize("disk_cost, moves", [(1.0, 4), (4.0, 1)])
def test_a_review_comes_sooner_when_the_limit_is_in_doubt(disk_cost: float, moves: int) -> None:
    """When so many pages have moved that what was left of the limit may be used up."""
    line = Line(disk_cost=disk_cost)
    line.add(pages(3))
    other = line.add(pages(3, device=5))
    assert line.step() == [0, 1]
    put(other.table.pages, 8)
    line.budget.note_relocated(moves)
    assert line.step(2 * DOUBT_STEPS) == [0, 1], "the four pages that were left"
    line.budget.note_relocated(1)
    assert line.step() == [0]
    put(other.table.pages, 3)
    line.budget.note_relocated(LIMIT)
    assert line.step(DOUBT_STEPS - 1) == [0], "not in every step"
    assert line.step() == [0, 1]


def test_nobody_waits_without_cold_pages_or_without_a_limit() -> None:
    line = Line()
    for _ in range(3):
        line.add(pages(8))
    assert line.step(2) == [0]
    line.cache.has_cold = False
    assert line.step() == [0, 1, 2] and not line.cache.parked and line.budget.is_steady
    line.cache.has_cold = True
    assert line.step() == [0], "looked at anew"
    line = Line(limit=0)
    for _ in range(3):
        line.add(pages(8))
    assert line.step(2 * REVIEW_STEPS) == [0, 1, 2]
