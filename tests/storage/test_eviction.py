"""What leaves the device when a step needs room, and where it goes, case by case."""

import pytest
from support.ledgers import end, put

from distkv.errors import CapacityError
from distkv.storage.ledger.disk_refusals import MAX_REFUSALS
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import DEVICE, DISK, HOST, Tier


def copied(cache: TieredCache) -> list[tuple[Tier, Tier]]:
    """The routes of what the next plan starts; it waits for each copy from the device to the host."""
    transfers, wait = cache.take_transfers()
    assert set(wait) >= {one.id for one in transfers if (one.source, one.target) == (DEVICE, HOST)}
    cache.integrity_check()
    return [(one.source, one.target) for one in transfers]


# --- who goes ---


def test_idle_pages_go_first_then_those_that_wait_then_the_oldest_and_first_ones_last() -> None:
    cache = TieredCache((7, 20, 0), 1)
    ledger = cache._ledger
    first, second, third = (put(ledger, DEVICE, HOST, index=index) for index in (0, 1, 2))
    waiting = [put(ledger, DEVICE, HOST, index=index) for index in (0, 1)]
    cache.park(waiting)
    idle = [put(ledger, DEVICE, HOST, idle=True) for _ in range(2)]
    order = [*idle, *waiting, second, third, first]
    for count in range(8):
        assert cache.reserve(count)
        assert [page.has(DEVICE) for page in order] == [False] * count + [True] * (7 - count)
    assert copied(cache) == []


def test_no_more_goes_than_is_needed() -> None:
    cache = TieredCache((4, 20, 0), 1)
    pages = [put(cache._ledger, DEVICE, HOST) for _ in range(3)]
    assert cache.reserve(1) and all(page.has(DEVICE) for page in pages)
    assert cache.reserve(2) and [page.has(DEVICE) for page in pages] == [False, True, True]


def test_pages_that_are_written_cannot_go() -> None:
    cache = TieredCache((3, 20, 0), 1)
    page = put(cache._ledger, DEVICE, HOST)
    for _ in range(2):
        cache.allocate(0)
    with pytest.raises(CapacityError, match=r"^2 device pages are needed in a step, 1 of 3 are free .*device_kv_bytes"):
        cache.reserve(2)
    assert not page.has(DEVICE)
    cache.promote([page])
    cache._ledger.start(page, HOST, DEVICE)
    assert not cache.reserve(1) and cache.awaited, "one that is on its way up may go when it is there"


# --- an idle page that lies on the device alone ---


@pytest.mark.parametrize(
    "host, stays",
    [
        (["free"], True),
        (["later"], False),
        (["earlier"], True),
        (["held"], False),
        (["later", "later, and on disk"], True),
        (["earlier", "later, and on the device"], True),
        (["earlier, on its way to disk"], False),
    ],
)
def test_an_idle_page_goes_to_the_host_where_others_matter_less(host: list[str], stays: bool) -> None:
    cache = TieredCache((3, len(host), 9), 1)
    ledger = cache._ledger
    there = {what: put(ledger, HOST, idle=True) for what in host if what.startswith("earlier")}
    page = put(ledger, DEVICE, idle=True)
    for what in host:
        if what.startswith("later"):
            others = [DISK] if "disk" in what else [DEVICE] if "device" in what else []
            there[what] = put(ledger, HOST, *others, idle=True)
        elif what == "held":
            put(ledger, HOST)
    if "earlier, on its way to disk" in host:
        ledger.start(there["earlier, on its way to disk"], HOST, DISK)
        cache.take_transfers()
    assert cache.reserve(ledger.slots[DEVICE].num_free + 1)
    assert copied(cache) == ([(DEVICE, HOST)] if stays else [])
    assert page.has(HOST) == stays and page.is_idle == stays and not page.has(DEVICE)
    gone = [what for what, one in there.items() if not one.has(HOST)]
    assert gone == ([host[-1]] if stays and host != ["free"] else []), "one that lies elsewhere too, if there is one"


def test_an_idle_page_that_lies_below_just_goes() -> None:
    cache = TieredCache((3, 9, 9), 1)
    pages = [put(cache._ledger, DEVICE, below, idle=True) for below in (HOST, DISK)]
    moving = put(cache._ledger, DEVICE, idle=True)
    cache._ledger.start(moving, DEVICE, HOST)
    cache.take_transfers()
    assert cache.reserve(3)
    assert cache.take_transfers() == ([], [0]) and cache.num_idle == 3
    assert pages[0].has(HOST) and pages[1].has(DISK) and moving.has(HOST), "whose copy is waited for"


# --- a held page ---


def test_a_held_page_that_lies_on_disk_just_goes() -> None:
    cache = TieredCache((1, 9, 9), 1)
    page = put(cache._ledger, DEVICE, DISK)
    assert cache.reserve(1) and copied(cache) == [] and not page.has(DEVICE)


@pytest.mark.parametrize(
    "host, disk, goes",
    [
        (["idle", "on disk", "idle, on disk"], "room", "idle, on disk"),
        (["idle", "on disk"], "room", "on disk"),
        (["idle", "held"], "room", ""),
        (["idle", "held"], "full", "idle"),
        (["idle", "held"], "refuses", "idle"),
        (["idle", "held"], "none", "idle"),
    ],
)
def test_who_gives_way_on_a_full_host(host: list[str], disk: str, goes: str) -> None:
    """What lies elsewhere too, then what would have to go to disk and cannot; else it is written there first."""
    cache = TieredCache((2, len(host), 0 if disk == "none" else 2), 1)
    ledger = cache._ledger
    page = put(ledger, DEVICE)
    there = {}
    for what in host:
        there[what] = put(ledger, HOST, *([DISK] if "disk" in what else []), idle=what.startswith("idle"))
    if disk == "full":
        for _ in range(2):
            put(ledger, DISK)
    elif disk == "refuses":
        ledger.refusals.refuse("full", had_room=False)
    room = cache.reserve(2)
    gone = [what for what, one in there.items() if not one.has(HOST)]
    if goes:
        assert room and gone == [goes] and page.has(HOST) and (DEVICE, HOST) in copied(cache)
        return
    assert not room and not gone and page.has(DEVICE)
    assert copied(cache) == [(HOST, DISK)] * 2
    assert not cache.reserve(2) and cache.awaited == [0], "until one of them is there"
    ledger.finish(1)
    assert cache.reserve(2) and page.has(HOST) and not there["held"].has(HOST)


def test_a_host_copy_of_what_lies_on_the_device_is_the_last_to_give_way() -> None:
    """Without a disk; it is made again when there is room."""
    cache = TieredCache((3, 2, 0), 1)
    ledger = cache._ledger
    below, both, page = put(ledger, HOST), put(ledger, DEVICE, HOST, index=0), put(ledger, DEVICE)
    assert cache.reserve(2)
    assert copied(cache) == [(DEVICE, HOST)] and page.has(HOST) and below.has(HOST)
    assert both.has(DEVICE) and not both.has(HOST)
    with pytest.raises(
        CapacityError, match=r"hold \[1, 2, 0\] KV pages of \[3, 2, 0\] and have no room .*host_kv_bytes"
    ):
        cache.reserve(3)
    ledger.drop(below, HOST)
    ledger.held.remove(below)
    cache.balance()
    assert copied_later(cache) == [(DEVICE, HOST)]


def copied_later(cache: TieredCache) -> list[tuple[Tier, Tier]]:
    """The routes of what the next plan starts and does not wait for."""
    transfers, wait = cache.take_transfers()
    assert not wait
    return [(one.source, one.target) for one in transfers]


def test_what_is_under_way_on_the_host_may_make_room() -> None:
    cache = TieredCache((2, 1, 0), 1)
    below, page = put(cache._ledger, HOST), put(cache._ledger, DEVICE)
    cache._ledger.start(below, HOST, DEVICE)
    cache.take_transfers()
    assert not cache.reserve(1) and cache.awaited == [0]
    end(cache._ledger)
    assert cache.reserve(1) and (page.has(HOST) or below.has(HOST))


def test_a_disk_that_refuses_is_tried_in_the_room_of_idle_pages_a_few_times() -> None:
    cache = TieredCache((1, 1, 9), 1)
    ledger = cache._ledger
    put(ledger, HOST)
    put(ledger, DEVICE)
    idle = [put(ledger, DISK, idle=True) for _ in range(MAX_REFUSALS + 1)]
    for number in range(1 + MAX_REFUSALS):  # once without giving up room
        assert not cache.reserve(1)
        assert copied(cache) == [(HOST, DISK)]
        assert [page.has(DISK) for page in idle] == [False] * number + [True] * (MAX_REFUSALS + 1 - number)
        assert not cache.reserve(1) and copied(cache) == [], "one at a time"
        ledger.fail(number, "the disk is full")
    assert cache.capacity == 2
    with pytest.raises(CapacityError, match=r"\(the disk refuses more: the disk is full\)"):
        cache.reserve(1)
    assert [page.has(DISK) for page in idle] == [False] * MAX_REFUSALS + [True]


def test_a_refusal_costs_nothing_while_other_pages_are_on_their_way_to_disk() -> None:
    cache = TieredCache((1, 2, 9), 1)
    pages = [put(cache._ledger, HOST) for _ in range(2)]
    put(cache._ledger, DEVICE)
    idle = put(cache._ledger, DISK, idle=True)
    assert not cache.reserve(1) and copied(cache) == [(HOST, DISK)] * 2
    cache._ledger.fail(0, "the disk is full")
    assert not cache.reserve(1) and cache.awaited == [1] and idle.has(DISK)
    end(cache._ledger)
    assert cache.reserve(1) and [page.has(HOST) for page in pages] == [True, False]
