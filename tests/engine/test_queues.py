"""What the leader remembers is bounded by the pages that there are, and cheap to keep."""

import gc
import random

import pytest
from support.history import GREEDY, caching_engine
from support.memory import drain

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.prefix_index import page_key


def churn(engine: Engine, count: int) -> None:
    """Runs requests of other tokens, one after the other."""
    for number in range(count):
        prompt = random.Random(number).choices(range(3, 50), k=70)
        engine.add([EngineRequest(str(number), prompt, GREEDY, 20, seed=0)])
        drain(engine)
        engine.integrity_check()


@pytest.mark.parametrize("num_disk_pages", [0, 30])
@pytest.mark.parametrize("num_host_pages", [1, 10])
def test_no_page_waits_to_be_saved_that_cannot_be(num_host_pages: int, num_disk_pages: int) -> None:
    """Without a disk, or with one that takes nothing."""
    engine, _ = caching_engine(
        {"fault_rate": 1.0}, num_pages=12, num_host_pages=num_host_pages, num_disk_pages=num_disk_pages
    )
    churn(engine, 40)
    ledger = engine._cache._ledger
    assert len(ledger.unsaved) <= (num_host_pages if num_disk_pages else 0)
    assert len(ledger.unspilled) <= 12


def test_what_a_disk_has_refused_is_saved_when_it_takes_pages_again() -> None:
    engine, memory = caching_engine({"fault_rate": 1.0}, num_pages=30, num_host_pages=30, num_disk_pages=30)
    churn(engine, 3)
    assert engine.stats().disk_pages == 0
    memory.fault_rate = 0.0
    engine._cache.retry_disk()
    churn(engine, 1)
    assert engine.stats().disk_pages == engine.stats().idle_pages


def test_the_garbage_collector_does_not_look_at_pages() -> None:
    """It would stop the leader for a third of a second with 100,000 of them."""
    key = page_key(b"root", [1, 2])
    page = Page(0, key=key)
    gc.collect()  # what it has seen to hold numbers alone, it does not look at again
    assert not any(map(gc.is_tracked, (page, key, page.slots, page.filling, page.reading)))


def test_a_prefix_is_looked_up_again_only_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = caching_engine(num_pages=7)  # for one at a time
    cache, searches = engine._cache, list[int]()
    find = cache.find
    monkeypatch.setattr(cache, "find", lambda keys: searches.append(1) or find(keys))
    prompt = random.Random(0).choices(range(3, 50), k=40)
    engine.add([EngineRequest(str(number), [number, *prompt], GREEDY, 40, seed=0) for number in range(3, 7)])
    drain(engine)
    # at most when it comes, when a page fills, and when one is given up; not at each of the 40 steps of each request
    assert len(searches) < 4 + 4 * 8
