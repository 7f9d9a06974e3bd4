"""What comes up to stay and what gives way to it, case by case."""

import pytest
from support.ledgers import end, put

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.promotion import Promotion
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.tier import DEVICE, DISK, HOST, Tier

LOW = (1, 2)
"""A device needs a free slot, and twice as many stay free; a host two."""


def tiers(*num_pages: int) -> tuple[TierLedger, Promotion]:
    ledger = TierLedger((num_pages[0], num_pages[1], num_pages[2]), write_through=False)
    return ledger, Promotion(ledger, LOW)


def promoted(ledger: TierLedger, promotion: Promotion, *cold: Page) -> list[Tier | None]:
    """Where each of the pages is on its way to."""
    promotion.promote(cold)
    ledger.integrity_check()
    transfers, wait = ledger.transfers.take()
    assert not wait
    targets = {ledger.transfers.under_way[one.id][1]: one.target for one in transfers}
    return [targets.get(page) for page in cold]


def test_there_is_something_to_do_while_a_page_lies_lower_than_there_is_room() -> None:
    ledger, promotion = tiers(4, 6, 9)
    assert not promotion.may_promote, "nobody holds anything"
    put(ledger, DISK, idle=True)
    put(ledger, DEVICE)
    assert not promotion.may_promote, "what is held lies on the device"
    cold = put(ledger, HOST)
    assert promotion.may_promote, "three slots of the device are free"
    put(ledger, DEVICE, HOST)
    assert not promotion.may_promote, "two are"
    deep = put(ledger, DISK)
    assert not promotion.may_promote, "and four of the host"
    ledger.drop(cold, HOST)
    ledger.held.remove(cold)
    assert promotion.may_promote, "five are"
    assert promoted(ledger, promotion, deep) == [HOST]
    end(ledger)
    assert not promotion.may_promote


def test_pages_that_may_give_way_count_as_room() -> None:
    for held in (1, 2):
        ledger, promotion = tiers(4, 9, 9)
        cold = put(ledger, HOST)
        parked = [put(ledger, DEVICE, HOST) for _ in range(held)]
        idle = [put(ledger, DEVICE, HOST, idle=True) for _ in range(4 - held)]
        assert promotion.may_promote == (held == 1)
        for page in parked[1:]:
            ledger.held.park(page)
        assert promotion.may_promote
        assert promoted(ledger, promotion, cold) == [DEVICE]
        assert not idle[0].has(DEVICE), "the one that was used least recently"
        assert all(page.has(DEVICE) for page in idle[1:] + parked)


def test_a_page_without_another_copy_does_not_give_way() -> None:
    ledger, promotion = tiers(3, 9, 9)
    cold = put(ledger, HOST)
    alone = [put(ledger, DEVICE, idle=True) for _ in range(3)]
    assert promoted(ledger, promotion, cold) == [None]
    assert all(page.has(DEVICE) for page in alone)
    ledger, promotion = tiers(0, 5, 9)
    deep = put(ledger, DISK)
    alone = [put(ledger, HOST, idle=True) for _ in range(4)]
    on_disk = put(ledger, HOST, DISK, idle=True)
    assert promoted(ledger, promotion, deep, put(ledger, DISK)) == [HOST, None]
    assert all(page.has(HOST) for page in alone) and not on_disk.has(HOST)
    ledger, promotion = tiers(4, 9, 9)
    deep = put(ledger, DISK)
    for page in [put(ledger, DEVICE, HOST, DISK) for _ in range(4)]:
        ledger.held.park(page)
    for _ in range(5):
        put(ledger, HOST, idle=True)
    assert promoted(ledger, promotion, deep) == [None], "those that wait give way on the device alone"


@pytest.mark.parametrize("first, idle, gives_way", [(True, True, False), (False, True, True), (True, False, True)])
def test_an_idle_page_gives_way_to_one_that_was_used_later_or_is_held(first: bool, idle: bool, gives_way: bool) -> None:
    ledger, promotion = tiers(3, 9, 9)
    pages = [put(ledger, HOST, idle=idle)] if first else []
    there = [put(ledger, DEVICE, HOST, idle=True) for _ in range(3)]
    pages = pages or [put(ledger, HOST, idle=idle)]
    assert promoted(ledger, promotion, *pages) == [DEVICE if gives_way else None]
    assert [one.has(DEVICE) for one in there] == [not gives_way, True, True]


def test_those_that_wait_give_way_to_what_is_held() -> None:
    ledger, promotion = tiers(5, 9, 9)
    parked = [put(ledger, DEVICE), put(ledger, DEVICE, HOST), put(ledger, DEVICE, HOST), put(ledger, DEVICE, DISK)]
    put(ledger, DEVICE)
    for page in parked:
        ledger.held.park(page)
    ledger.start(parked[1], DEVICE, DISK)  # something reads it
    idle, held, another = put(ledger, HOST, idle=True), put(ledger, HOST), put(ledger, HOST)
    assert promoted(ledger, promotion, idle) == [None]
    assert promoted(ledger, promotion, held) == [DEVICE]
    assert [page.has(DEVICE) for page in parked] == [True, True, False, True]
    assert promoted(ledger, promotion, another) == [DEVICE]
    assert [page.has(DEVICE) for page in parked] == [True, True, False, False]


def test_pages_come_up_in_order_until_neither_tier_has_room() -> None:
    ledger, promotion = tiers(4, 9, 20)
    there = put(ledger, DEVICE, HOST)
    on_host, on_disk = [put(ledger, HOST) for _ in range(2)], [put(ledger, DISK) for _ in range(5)]
    wanted = [there, on_host[0], on_disk[0], on_host[1], *on_disk[1:]]
    assert promoted(ledger, promotion, *wanted) == [None, DEVICE, HOST, None, HOST, None, None, None]
    assert [slots.num_free for slots in ledger.slots[:2]] == [2, 4]
    assert promoted(ledger, promotion, *wanted) == [None] * len(wanted), "what is on its way counts"
    end(ledger)
    assert on_disk[0].has(HOST) and on_disk[0].has(DISK)


def test_a_page_is_brought_from_disk_though_the_device_is_full_and_the_other_way_round() -> None:
    ledger, promotion = tiers(2, 9, 9)
    near = [put(ledger, DEVICE, HOST, idle=True) for _ in range(2)]
    deep = put(ledger, DISK)
    assert promoted(ledger, promotion, put(ledger, HOST), deep) == [None, HOST]
    assert all(page.has(DEVICE) for page in near), "which is no more than twice the room of a step"
    assert promoted(ledger, promotion, deep) == [None], "once"
    assert promoted(ledger, promotion, put(ledger)) == [None], "a lost page cannot be read"
    ledger, promotion = tiers(9, 2, 9)
    assert promoted(ledger, promotion, put(ledger, DISK), put(ledger, HOST)) == [None, DEVICE]


def test_the_room_of_two_steps_stays_free() -> None:
    ledger, promotion = tiers(3, 9, 9)
    idle = put(ledger, DEVICE, HOST, idle=True)
    assert promoted(ledger, promotion, put(ledger, HOST)) == [DEVICE]
    assert not idle.has(DEVICE) and ledger.slots[DEVICE].num_free == 2
    ledger, promotion = tiers(0, 5, 9)
    idle = put(ledger, HOST, DISK, idle=True)
    assert promoted(ledger, promotion, put(ledger, DISK)) == [HOST]
    assert not idle.has(HOST) and ledger.slots[HOST].num_free == 4
