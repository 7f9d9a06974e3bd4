"""What the ledger's books say and give out: held pages, transfers, changes on disk."""

import pytest
from support.ledgers import end, put

from distkv.storage.ledger.disk_journal import DiskChanges, DiskJournal
from distkv.storage.ledger.disk_refusals import MAX_REFUSALS
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.prefix_index import page_keys
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.ledger.write_back import WriteBack
from distkv.storage.tier import DEVICE, DISK, HOST, Tier


def ledger_of(*num_pages: int, write_through: bool = False) -> TierLedger:
    return TierLedger((num_pages[0], num_pages[1], num_pages[2]), write_through)


# --- what happens on disk ---


@pytest.mark.parametrize(
    "changes", [DiskChanges({1}), DiskChanges(written={1: (2, Page(0))}), DiskChanges(touched={1})]
)
def test_any_change_is_one(changes: DiskChanges) -> None:
    """A catalogue is brought up to date when there is something to take in, and only then."""
    assert changes and not DiskChanges()


def test_uses_that_are_forgotten_are_not_told() -> None:
    journal = DiskJournal()
    journal.touch(1)
    journal.vacate(2)
    journal.forget_uses()
    assert journal.take() == DiskChanges({2})


# --- pages with a holder ---


def test_an_id_is_given_again_when_its_page_has_gone() -> None:
    ledger = ledger_of(5, 5, 5)
    pages = [put(ledger, DEVICE) for _ in range(3)]
    assert [page.id for page in pages] == [0, 1, 2]
    pages[1].repairs = 2
    ledger.drop(pages[1], DEVICE)
    ledger.held.remove(pages[1])
    assert len(ledger.held) == 2 and list(ledger.held) == [pages[0], pages[2]]
    ledger.held.add(pages[1])
    ledger.take_slot(pages[1], DEVICE)
    ledger.enter(pages[1], DEVICE)
    assert pages[1].id == 1 and pages[1].repairs == 0, "whoever held it before is forgotten"
    assert put(ledger, DEVICE).id == 3


def test_a_location_is_told_once_and_again_when_the_plan_was_lost() -> None:
    ledger = ledger_of(5, 5, 5)
    there, moving, lost = put(ledger, DEVICE), put(ledger, DEVICE, HOST), put(ledger)
    assert ledger.held.take_relocated() == [there, moving] and ledger.held.take_relocated() == []
    ledger.drop(moving, DEVICE)
    assert ledger.held.take_relocated() == [moving]
    ledger.take_slot(lost, DEVICE)
    ledger.held.recover(lost)
    ledger.enter(lost, DEVICE)
    assert ledger.held.take_relocated() == [lost], "when there is one"
    ledger.drop(there, DEVICE)
    ledger.held.remove(there)
    ledger.held.put_back([there, lost])
    assert ledger.held.take_relocated() == [lost], "of pages that are held still"
    ledger.start(moving, HOST, DISK)
    assert ledger.held.take_relocated() == []
    end(ledger)
    assert ledger.held.take_relocated() == [moving], "it has another copy"
    ledger.held.relocate(moving)
    ledger.held.remove(moving)
    assert ledger.held.take_relocated() == [], "nobody looks for it"


def test_that_an_id_names_another_page_is_told_with_its_location() -> None:
    ledger = ledger_of(5, 5, 5)
    first, second = put(ledger, DEVICE), put(ledger, DEVICE)
    assert ledger.held.take_new([first]) == [first] and ledger.held.take_new([first, second]) == [second]
    ledger.held.relocate(first)
    assert ledger.held.take_new(ledger.held.take_relocated()) == [], "one that has moved is the same"
    ledger.drop(second, DEVICE)
    ledger.held.remove(second)
    ledger.held.put_back([first, second])
    assert ledger.held.take_new([first, second]) == [first], "of a plan that was lost, and of pages that are held still"
    assert ledger.held.take_new([put(ledger, DEVICE)]) and not ledger.held.take_new([second])


def test_pages_are_counted_where_they_lie() -> None:
    ledger = ledger_of(5, 5, 5)
    for tiers in ((DEVICE,), (DEVICE, HOST), (HOST, DISK), (DISK,), (DEVICE, DISK)):
        put(ledger, *tiers)
    put(ledger, DEVICE, HOST, idle=True)
    assert (ledger.held.num_on_device, ledger.held.num_above_disk, len(ledger.held)) == (3, 4, 5)
    for page in list(ledger.held):
        for tier in (DEVICE, HOST, DISK):
            if page.has(tier):
                ledger.drop(page, tier)
        ledger.held.remove(page)
    assert (ledger.held.num_on_device, ledger.held.num_above_disk, len(ledger.held)) == (0, 0, 0)


# --- copies under way ---


def test_a_copy_that_counts_as_ended_leaves_nothing_behind_when_it_is_reported() -> None:
    ledger = ledger_of(5, 5, 5)
    page = put(ledger, DEVICE)
    ledger.start(page, DEVICE, HOST)
    [transfer], _ = ledger.transfers.take()
    ledger.force(page)
    assert page.has(HOST) and ledger.transfers.take() == ([], [transfer.id])
    ledger.force(page)
    assert ledger.transfers.take() == ([], []), "once"
    ledger.drop(page, HOST)
    other = put(ledger, HOST)
    assert other.slots[HOST] == transfer.target_slot
    ledger.finish(transfer.id)
    ledger.integrity_check()
    assert not page.has(HOST) and other.has(HOST), "what came of the slot since is true"
    books = vars(ledger.transfers)
    assert not any(books[name] for name in books if name != "_next_id"), "or memory would follow their number"


def test_the_oldest_write_to_disk_is_waited_for_first() -> None:
    ledger = ledger_of(5, 5, 5)
    spilled, first, second = put(ledger, DEVICE), put(ledger, HOST), put(ledger, HOST)
    ledger.start(spilled, DEVICE, HOST)
    ledger.start(second, HOST, DISK)
    ledger.start(first, HOST, DISK)
    assert ledger.transfers.disk_writes == [1, 2]
    ledger.finish(1)
    assert ledger.transfers.disk_writes == [2] and second.has(DISK) and not first.has(DISK)


@pytest.mark.parametrize("target", [HOST, DISK])
def test_a_failed_copy_gives_its_slot_back(target: Tier) -> None:
    ledger, source = ledger_of(5, 5, 5), {HOST: DISK, DISK: HOST}[target]
    page = put(ledger, source)
    ledger.start(page, source, target)
    unread = ledger.fail(0, "the disk is on fire")
    assert unread is (page if source is DISK else None), "the page that could not be read"
    assert ledger.slots[target].num_used == 0 and ledger.refusals.paused == (target is DISK)
    assert ("on fire" in ledger.refusals.remark) == (target is DISK)
    ledger.integrity_check()


def test_an_idle_page_that_the_disk_refuses_stays_where_it_is() -> None:
    ledger = ledger_of(5, 5, 5)
    others = [put(ledger, DISK, idle=True) for _ in range(MAX_REFUSALS + 1)]
    page = put(ledger, HOST, idle=True)
    ledger.start(page, HOST, DISK)
    ledger.fail(0, "the disk is full")
    assert ledger.refusals.paused, "what it takes is in the room of others"
    for id, other in enumerate(others[:MAX_REFUSALS], 1):
        assert not ledger.refusals.hopeless and not ledger.slots[DISK].num_free
        ledger.drop(other, DISK)
        ledger.start(page, HOST, DISK)
        ledger.fail(id, "the disk is full")
        assert page.has(HOST) and set(ledger.index) == {page, *others[id:]}
    ledger.start(page, HOST, DEVICE)
    end(ledger)
    assert ledger.refusals.hopeless, "what does not go to disk says nothing of it"
    ledger.refusals.lift()
    ledger.start(page, HOST, DISK)
    end(ledger)
    ledger.refusals.refuse("full", had_room=True)
    assert not ledger.refusals.hopeless, "the row has ended"


# --- what is saved for later processes ---


@pytest.mark.parametrize("write_through", [False, True])
def test_pages_with_a_key_are_saved_when_they_are_idle_or_at_once(write_through: bool) -> None:
    ledger = ledger_of(9, 9, 9, write_through=write_through)
    held, another, nameless = put(ledger, DEVICE, keyed=True), put(ledger, DEVICE, keyed=True), put(ledger, DEVICE)
    for page in (held, another, nameless):
        ledger.start(page, DEVICE, HOST)
    end(ledger)
    ledger.drop(held, DEVICE)
    ledger.start(held, HOST, DEVICE)
    end(ledger)
    at_once = [held, another] if write_through else []
    assert list(ledger.unsaved) == at_once, "once, in their order"
    assert not ledger.needs_saving(nameless) and ledger.needs_saving(held) == write_through
    saved = put(ledger, HOST, DISK, idle=True)
    last, first = put(ledger, HOST, idle=True), put(ledger, DEVICE, HOST, idle=True)
    put(ledger, DEVICE, idle=True)
    assert list(ledger.unsaved) == [first, last, *at_once], "the first of a prefix is let go last"
    assert ledger.journal.take().touched == {saved.slots[DISK]}
    ledger.start(first, HOST, DISK)
    end(ledger)
    assert not ledger.needs_saving(first) and ledger.needs_saving(last)
    assert list(ledger.journal.take().written) == [first.slots[DISK]]


# --- pages that nobody holds any more ---


def test_what_follows_a_forgotten_page_is_free_too() -> None:
    ledger = ledger_of(9, 9, 9)
    pages = [put(ledger, DEVICE, HOST, index=index) for index in range(3)]
    for page, key in zip(pages, page_keys(b"root", range(3), 1), strict=True):
        ledger.index.add(page, key)
    other = put(ledger, DEVICE, idle=True)
    for page in (pages[0], pages[2]):
        ledger.held.remove(page)
        ledger.rest(page)
    assert ledger.num_idle == 3
    ledger.forget(pages[0])
    assert ledger.num_idle == 2 and pages[0].lost, "the next one is held, and so nothing behind it goes"
    ledger.held.remove(pages[1])
    ledger.rest(pages[1])
    ledger.drop(pages[1], DEVICE)
    assert ledger.num_idle == 3 and pages[1].has(HOST)
    ledger.drop(pages[1], HOST)
    assert ledger.num_idle == 1 and pages[2].lost and list(ledger.index) == [other], "its last copy went"
    assert [slots.num_used for slots in ledger.slots] == [1, 0, 0]
    ledger.integrity_check()


def test_a_copy_that_arrives_for_nobody_is_given_up() -> None:
    ledger = ledger_of(5, 5, 5)
    page = put(ledger, DEVICE)
    ledger.start(page, DEVICE, HOST)
    ledger.held.remove(page)
    ledger.free_unheld(page)
    assert [slots.num_used for slots in ledger.slots] == [1, 1, 0], "while it is read"
    end(ledger)
    assert [slots.num_used for slots in ledger.slots] == [0, 0, 0]


def test_the_owners_of_bad_slots_are_those_of_the_plan() -> None:
    """One that has given its slot up since is still who could not read it; one that nobody holds has lost nothing."""
    ledger = ledger_of(9, 9, 9)
    page, gone = put(ledger, HOST, DISK), put(ledger, HOST, DISK)
    idle, forgotten = put(ledger, DISK, idle=True), put(ledger, DISK, idle=True)
    bad = {one.slots[DISK] or 0 for one in (page, gone, idle, forgotten)}
    ledger.drop(forgotten, DISK)
    ledger.drop(gone, DISK)
    assert put(ledger, HOST, DISK).slots[DISK] in bad, "its slot has gone to another"
    assert ledger.take_owners(bad | {8}) == {page, gone}
    assert ledger.take_owners(set()) == set()
    assert gone not in ledger.take_owners(bad), "a report is about one plan"


def test_what_finds_no_room_on_disk_is_saved_when_a_slot_is_freed() -> None:
    for others_are_held in (True, False):  # all of them, or all but one that was used later
        ledger = TierLedger((2, 4, 2), write_through=False)
        page = put(ledger, HOST, idle=True)
        held = [put(ledger, DISK), put(ledger, DISK) if others_are_held else put(ledger, DISK, idle=True)][0]
        write_back = WriteBack(ledger, low=0)
        write_back.balance()
        assert page.slots[DISK] is None and page in {*ledger.unsaved, *ledger.put_off}
        ledger.held.remove(held)
        ledger.free_unheld(held)
        write_back.balance()
        end(ledger)
        assert page.has(DISK) and not ledger.unsaved and not ledger.put_off
