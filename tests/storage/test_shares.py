"""What gives way where tenants have shares of device and host, case by case. Of two tenants, B keeps to its share."""

import pytest
from support.ledgers import end, put

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import DEVICE, DISK, HOST, Tier

A, B = b"a", b"b"


def left(pages: list[Page], tier: Tier) -> list[bool]:
    return [page.has(tier) for page in pages]


def test_the_surplus_of_a_tenant_leaves_the_device_first() -> None:
    """Its idle pages, held ones that lie elsewhere too, first pages last; then whoever comes first without shares."""
    cache = TieredCache((10, 20, 0), 1, share=0.4)
    ledger = cache._ledger
    others = [put(ledger, DEVICE, HOST, idle=True, tenant=B) for _ in range(2)]
    unknown = put(ledger, DEVICE, HOST, idle=True)  # what an earlier process has left counts as nobody's
    first, second = (put(ledger, DEVICE, HOST, index=index, tenant=A) for index in (0, 1))
    own = [put(ledger, DEVICE, HOST, idle=True, tenant=A) for _ in range(5)]
    order = [*own[:3], *others, unknown, *own[3:], second, first]
    for count in range(11):
        assert cache.reserve(count)
        assert left(order, DEVICE) == [False] * count + [True] * (10 - count)


def test_what_a_tenant_is_about_to_take_counts() -> None:
    cache = TieredCache((10, 20, 0), 1, share=0.5)
    ledger = cache._ledger
    other = put(ledger, DEVICE, HOST, idle=True, tenant=B)
    own = [put(ledger, DEVICE, HOST, idle=True, tenant=A) for _ in range(5)]
    held = [put(ledger, DEVICE, HOST) for _ in range(4)]
    assert cache.reserve(2, {A: 2}) and left([other, *own], DEVICE) == [True, False, False, True, True, True]
    assert cache.reserve(3, {B: 3}) and left([other, *own[2:]], DEVICE) == [False, True, True, True]
    assert all(left(held, DEVICE))


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("is_idle", [True, False])
def test_an_idle_page_takes_no_place_of_others_on_the_host_beyond_its_share(share: float | None, is_idle: bool) -> None:
    cache = TieredCache((4, 4, 0), 1, share=share)
    ledger = cache._ledger
    others = [put(ledger, HOST, idle=True, tenant=B) for _ in range(2)]
    own = [put(ledger, HOST, idle=is_idle, tenant=A) for _ in range(2)]
    new = [put(ledger, DEVICE, idle=True, tenant=A) for _ in range(4)]
    assert cache.reserve(2)
    assert left(others, HOST) == [share is not None] * 2
    assert left(own, HOST) == [not (share and is_idle)] * 2
    end(ledger)
    assert left(new[:2], HOST) == [not share or is_idle] * 2


def test_held_pages_beyond_a_share_go_to_disk_before_others_leave_the_host() -> None:
    for share in (None, 0.5):
        cache = TieredCache((3, 4, 8), 1, share=share)
        ledger = cache._ledger
        others = [put(ledger, HOST, DISK, idle=True, tenant=B) for _ in range(2)]
        own = [put(ledger, HOST, tenant=A) for _ in range(2)]
        for _ in range(3):
            put(ledger, DEVICE, tenant=A)
        if share:
            assert not cache.reserve(1) and cache.awaited, "its pages are written"
            end(ledger)
        assert cache.reserve(1)
        assert left(others, HOST) == ([True, True] if share else [False, True])
        assert left(own, DISK) == [share is not None] * 2 and cache.lost == {}


def test_a_tenant_at_its_share_keeps_nobody_from_being_written_through() -> None:
    cache = TieredCache((8, 4, 0), 1, share=0.5)
    ledger = cache._ledger
    for _ in range(2):
        put(ledger, HOST, tenant=A)
    others = [put(ledger, DEVICE, HOST, idle=True, tenant=B) for _ in range(2)]
    own, other = put(ledger, DEVICE, keyed=True, tenant=A), put(ledger, DEVICE, tenant=B)
    for page in (own, other):
        cache._write_back.spill_later(page)
    cache.balance()
    end(ledger)
    assert not own.has(HOST) and other.has(HOST) and sum(left(others, HOST)) == 1
    cache.release(own)
    assert own in ledger.unspilled, "it has another chance when nobody holds it any more"


def test_a_tenant_at_its_share_of_a_tier_brings_nothing_up_to_it() -> None:
    cache = TieredCache((10, 10, 10), 1, share=0.2)
    ledger = cache._ledger
    for _ in range(2):
        put(ledger, DEVICE, HOST, tenant=A)
    assert not cache.may_come_up(A) and cache.may_come_up(B)
    own, other = put(ledger, HOST, DISK, tenant=A), put(ledger, HOST, DISK, tenant=B)
    cache.promote([own, other])
    end(ledger)
    assert left([own, other], DEVICE) == [False, True]


def test_a_page_is_of_the_first_who_takes_it_up() -> None:
    cache = TieredCache((10, 10, 10), 1, share=0.5)
    ledger = cache._ledger
    waited_for, shared = put(ledger, HOST, DISK, idle=True), put(ledger, HOST, DISK, idle=True)
    cache.touch([waited_for], A)
    cache.share(shared, A)
    cache.integrity_check()
    assert waited_for.tenant == shared.tenant == A and ledger.shares.is_full(HOST, A, 4)
    assert cache.num_pages_of(A) == 1 and cache.num_pages_of(B) == cache.num_pages_of(None) == 0
    cache.release(shared)
    cache.integrity_check()
    cache.reset()
    cache.integrity_check()
    assert not ledger.shares.is_full(HOST, A, 5) and ledger.shares.is_full(HOST, A, 6)
