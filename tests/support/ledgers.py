"""Pages that lie where a test wants them, without the steps that would bring them there."""

from itertools import count

from distkv.storage.ledger.page import Page
from distkv.storage.ledger.prefix_index import page_key
from distkv.storage.ledger.tier_ledger import TierLedger
from distkv.storage.tier import Tier

_tokens = count()


def put(
    ledger: TierLedger,
    *tiers: Tier,
    index: int = 1,
    idle: bool = False,
    keyed: bool = False,
    tenant: bytes | None = None,
) -> Page:
    """A full page with a copy in each of these tiers, lost without any: held, with a key or without, or the idle one
    that was used last."""
    page = Page(index, references=0, full=True, tenant=tenant)
    if idle or keyed:
        ledger.index.add(page, page_key(b"root", [next(_tokens)]))
    if not idle:
        ledger.held.add(page)
        ledger.shares.hold(page)
    for tier in tiers:
        ledger.take_slot(page, tier)
        if not idle:
            ledger.enter(page, tier)
    if idle:
        ledger.rest(page)
    if not tiers:
        ledger.held.lose(page)
    ledger.integrity_check()
    return page


def end(ledger: TierLedger) -> None:
    """Has all transfers come to a good end."""
    ledger.transfers.take()
    for id in list(ledger.transfers.under_way):
        ledger.finish(id)
    ledger.integrity_check()
