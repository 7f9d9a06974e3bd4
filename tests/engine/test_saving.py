"""The end of an engine that has no time to save everything."""

import logging
from types import SimpleNamespace

import pytest
from support.memory import Memory, drain, engine_info

from distkv.engine import saving
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest
from distkv.sampling_params import SamplingParams
from distkv.storage.ledger.write_back import WriteBack
from distkv.storage.tier import DISK
from distkv.workers.group.rank_executor import RankExecutor

STEPS = 12  # that the time is enough for
NUM_PAGES = 10  # of each prompt


@pytest.mark.parametrize("write_through", [False, True])
def test_what_is_saved_in_time_can_be_used(
    write_through: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole beginnings of prompts, those first that ran when the engine was closed."""
    info = engine_info(
        max_model_len=400, num_host_pages=60, num_disk_pages=200, num_pages=80, enable_prefix_caching=True,
        write_through=write_through, save_timeout=5,
    )  # fmt: skip
    engine = Engine(info, RankExecutor(Memory(info, takes_writes=True).execute))
    cache = engine._cache
    monkeypatch.setattr(WriteBack, "_save", lambda _: None)  # the disk has not kept up
    for number in range(4):  # of which two have ended
        params = SamplingParams(max_tokens=2 if number < 2 else None, ignore_eos=True)
        engine.add([EngineRequest(str(number), [number] * 16 * NUM_PAGES, params, 400 if number > 1 else 2, number)])
    while engine._scheduler.waiting or any(not one.num_output_tokens for one in engine._scheduler.running):
        engine.step()
    for _ in range(40):
        engine.step()
    monkeypatch.undo()
    assert len(engine._scheduler.running) == 2 and cache.num_unsaved > 40
    seconds = iter(range(1000))
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: next(seconds) * 5 / STEPS))
    told: list[int] = []
    with caplog.at_level(logging.INFO):
        engine.close(told.append)
    pages = {page.key.digest: page for page in cache.index if page.key is not None}
    saved = {digest for digest, page in pages.items() if page.has(DISK)}
    assert saved and told[0] == len(pages)
    assert f"{len(pages) - len(saved)} KV pages were not saved (the 5 s of save_timeout were over" in caplog.text
    for digest in saved:
        page = pages[digest]
        assert page.key is not None
        assert not page.index or pages[page.key.parent].slots[DISK] is not None, "a page before it is missing"
        assert page.index >= NUM_PAGES or page.key.tokens[0] in (2, 3), "it is none of those that ran"


@pytest.mark.parametrize("has_room", [True, False])
def test_a_disk_that_was_full_is_asked_once_more_at_the_end(has_room: bool, caplog: pytest.LogCaptureFixture) -> None:
    """No step has counted the time until then, since the engine had nothing to do."""
    info = engine_info(num_host_pages=20, num_disk_pages=40, enable_prefix_caching=True)
    memory = Memory(info, fault_rate=1.0)
    engine = Engine(info, RankExecutor(memory.execute))
    engine.add([EngineRequest("a", [4] * 80, SamplingParams(max_tokens=5, ignore_eos=True), 5, seed=1)])
    drain(engine)
    assert engine._cache.num_unsaved == 5 and not engine.has_work
    memory.fault_rate = 0.0 if has_room else 1.0
    engine.close()
    assert engine._cache.num_unsaved == (0 if has_room else 5)
    assert ("5 KV pages were not saved (the disk refuses more: " in caplog.text) != has_room
