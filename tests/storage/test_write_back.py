"""What goes down ahead of need, and what gives way to it, case by case."""

import pytest
from support.ledgers import end, put

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.tier import DEVICE, DISK, HOST, Tier


def balanced(cache: TieredCache, *pages: Page) -> list[Tier | None]:
    """Where each of the pages is on its way to after a step."""
    cache.balance()
    cache.integrity_check()
    transfers, wait = cache.take_transfers()
    assert not wait
    targets = {cache._ledger.transfers.under_way[one.id][1]: one.target for one in transfers}
    return [targets.get(page) for page in pages]


def filled(cache: TieredCache) -> Page:
    """A page that has just become full."""
    page = cache.allocate(1)
    cache.fill(page)
    return page


# --- to the host ---


def test_an_idle_page_that_lies_on_disk_gives_its_host_slot_to_a_full_one() -> None:
    """The least recently used first; and then two slots are made free, since a step may fill one."""
    cache = TieredCache((5, 6, 5), 1)
    there = [put(cache._ledger, HOST), *(put(cache._ledger, HOST, DISK, idle=True) for _ in range(5))]
    assert balanced(cache, filled(cache)) == [HOST]
    assert [page.has(HOST) for page in there] == [True, False, False, False, True, True]


@pytest.mark.parametrize(
    "disk, gives_way",
    [
        ("has room", False),
        ("refuses", True),
        ("is full of what is held", True),
        ("is full of what was used later", True),
        ("is full of what was used earlier", False),
    ],
)
def test_one_that_lies_on_the_device_gives_way_where_it_will_not_go_to_disk(disk: str, gives_way: bool) -> None:
    cache = TieredCache((5, 1, 1), 1)
    if disk == "is full of what was used earlier":
        put(cache._ledger, DISK, idle=True)
    idle = put(cache._ledger, DEVICE, HOST, idle=True)
    if disk == "is full of what is held":
        put(cache._ledger, DISK)
    elif disk == "is full of what was used later":
        put(cache._ledger, DISK, idle=True)
    elif disk == "refuses":
        cache._ledger.refusals.refuse("full", had_room=False)
    assert balanced(cache, filled(cache), idle) == ([HOST, None] if gives_way else [None, DISK])
    assert idle.has(DEVICE) and idle.has(HOST) != gives_way


def test_one_that_lies_nowhere_else_stays() -> None:
    cache = TieredCache((5, 1, 0), 1)
    idle, page = put(cache._ledger, HOST, idle=True), filled(cache)
    assert balanced(cache, page) == [None] and idle.has(HOST)
    cache.reset()
    assert balanced(cache, page) == [HOST]


# --- to disk, for later processes ---


def test_so_many_pages_are_on_their_way_to_disk_at_a_time() -> None:
    cache = TieredCache((5, 60, 20), 1)
    pages = [put(cache._ledger, HOST, idle=True) for _ in range(MAX_DISK_WRITES + 2)]
    started = [DISK] * MAX_DISK_WRITES
    assert balanced(cache, *reversed(pages)) == [*started, None, None], "the first of a prefix is let go last"
    assert balanced(cache, *pages) == [None] * len(pages)
    [oldest, *_] = cache.awaited
    cache.apply([oldest], [], [])
    assert balanced(cache, *reversed(pages)) == [None] * MAX_DISK_WRITES + [DISK, None]


def test_a_disk_that_refuses_is_left_alone() -> None:
    cache = TieredCache((5, 60, 20), 1)
    page = put(cache._ledger, HOST, idle=True)
    cache._ledger.refusals.refuse("full", had_room=False)
    assert balanced(cache, page) == [None]
    cache.retry_disk()
    assert balanced(cache, page) == [DISK]


@pytest.mark.parametrize("write_through", [False, True])
def test_an_idle_page_on_disk_goes_for_one_that_was_used_later_or_is_held(write_through: bool) -> None:
    cache = TieredCache((5, 60, 1), 1, write_through)
    earlier, there = put(cache._ledger, HOST, idle=True), put(cache._ledger, DISK, idle=True)
    assert balanced(cache, earlier) == [None] and there.has(DISK)
    if write_through:
        later = put(cache._ledger, DEVICE, keyed=True)
        cache._ledger.start(later, DEVICE, HOST)
        end(cache._ledger)
    else:
        later = put(cache._ledger, HOST, idle=True)
    assert balanced(cache, later) == [DISK] and not there.has(DISK)
    end(cache._ledger)
    gone = put(cache._ledger, DEVICE, HOST, idle=True)
    cache._ledger.drop(gone, HOST)
    assert balanced(cache, gone) == [None] and later.has(DISK), "what has left the host cannot be written"


# --- to disk, for room on the host ---


def test_a_nearly_full_host_is_emptied_until_twice_the_room_is_free() -> None:
    cache = TieredCache((20, 12, 20), 2)
    pages = [put(cache._ledger, HOST) for _ in range(10)]
    assert balanced(cache, *pages) == [None] * 10, "two slots are free"
    pages.append(put(cache._ledger, HOST))
    assert balanced(cache, *pages) == [DISK] * MAX_DISK_WRITES + [None] * 7, "the oldest first"
    assert balanced(cache, *pages) == [None] * 11
    end(cache._ledger)
    balanced(cache)
    assert cache.slots[HOST].num_free == 4
    pages.append(put(cache._ledger, HOST))
    assert balanced(cache, *pages) == [None] * 12, "not before it is nearly full again"
    assert [page.has(HOST) for page in pages] == [False] * 3 + [True] * 9


def test_what_is_on_its_way_to_disk_counts_as_room_to_come() -> None:
    cache = TieredCache((20, 12, 20), 2)
    pages = [put(cache._ledger, HOST) for _ in range(11)]
    for page in pages[:3]:
        cache._ledger.start(page, HOST, DISK)
    cache.take_transfers()
    assert balanced(cache, *pages) == [None] * 11, "one slot is free, three will be"


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_idle_pages_leave_a_nearly_full_host_when_they_are_saved_or_cannot_be(disk_is_full: bool) -> None:
    cache = TieredCache((5, 6, 6), 1)
    for _ in range(6 * disk_is_full):
        put(cache._ledger, DISK)
    pages = [put(cache._ledger, HOST, idle=True) for _ in range(6)]
    assert balanced(cache, *pages) == [None] * 2 + [None if disk_is_full else DISK] * MAX_DISK_WRITES
    assert [page.has(HOST) for page in pages] == [not disk_is_full] * 2 + [True] * 4
    end(cache._ledger)
    balanced(cache)
    assert [page.has(HOST) for page in pages] == [not disk_is_full] * 2 + [disk_is_full] * 2 + [True] * 2


def test_without_a_disk_idle_pages_stay_on_a_full_host() -> None:
    cache = TieredCache((5, 4, 0), 1)
    pages = [put(cache._ledger, HOST, idle=True) for _ in range(4)]
    balanced(cache)
    assert all(page.has(HOST) for page in pages)


def test_disk_slots_of_pages_that_lie_further_up_are_given_up_for_it() -> None:
    """After those of idle ones, and not while one is read."""
    cache = TieredCache((9, 6, 5), 1)
    read, near, on_host = (
        put(cache._ledger, DEVICE, DISK),
        put(cache._ledger, DEVICE, DISK),
        put(cache._ledger, HOST, DISK),
    )
    alone, idle = put(cache._ledger, DISK), put(cache._ledger, DISK, idle=True)
    cache._ledger.start(read, DISK, HOST)
    cache._ledger.start(on_host, HOST, DEVICE)
    cache.take_transfers()
    pages = [put(cache._ledger, HOST) for _ in range(4)]
    assert balanced(cache, *pages) == [DISK, DISK, DISK, None]
    assert [page.has(DISK) for page in (read, near, on_host, alone, idle)] == [True, False, False, True, False]
