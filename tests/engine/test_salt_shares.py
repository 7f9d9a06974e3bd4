"""No tenant pushes out the pages of others, or keeps them waiting, where each has a share."""

import random
from pathlib import Path

import pytest
from support.history import caching_engine
from support.llms import idle_engine, tiered_options
from support.memory import PAGE_SIZE, drain
from support.prompts import random_prompt

from distkv import LLM
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.errors import CapacityError, ConfigError
from distkv.sampling_params import SamplingParams
from distkv.storage.ledger.prefix_index import root_key


def request(
    name: object, prompt_len: int, max_tokens: int, salt: str | None, is_known: bool = True, n: int = 1, **options: int
) -> EngineRequest:
    params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens if is_known else None, ignore_eos=True)
    prompt = random.Random(f"{name}").choices(range(3, 50), k=prompt_len)
    return EngineRequest(str(name), prompt, params, max_tokens, seed=1, cache_salt=salt, **options)


def cached(engine: Engine, one: EngineRequest) -> int:
    """Pages of a prompt that are found, after which it has been answered."""
    engine.add([one])
    [first, *_] = [output for output in drain(engine) if isinstance(output, TokenOutput)]
    return sum(first.num_cached_tokens) // PAGE_SIZE


@pytest.mark.parametrize("tiers", [(40, 0, 0), (12, 28, 0), (12, 28, 20)])
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_flood_of_one_tenant_leaves_the_prefix_of_another(tiers: tuple[int, int, int], share: float | None) -> None:
    device, host, disk = tiers
    engine, _ = caching_engine(
        {"takes_writes": True}, num_pages=device, num_host_pages=host, num_disk_pages=disk, max_share_per_salt=share,
        max_num_seqs=4, max_model_len=600,
    )  # fmt: skip
    known = 5
    wanted = request("b", known * PAGE_SIZE + 1, 1, "b")
    assert cached(engine, wanted) == 0
    flood = [request(f"a{number}", 100, 30, "a") for number in range(30)]
    engine.add(flood)
    outputs = drain(engine)
    ended = {output.request_id for output in outputs if output.finish_reason == "length"}
    assert ended == {one.request_id for one in flood}, "it gets its work done all the same"
    found = cached(engine, request("b", known * PAGE_SIZE + 1, 1, "b"))
    assert found == (known if share else 0)
    engine.integrity_check()


def test_others_begin_beside_a_tenant_that_waits_for_its_own_requests() -> None:
    engine, _ = caching_engine(num_pages=40, max_model_len=400, max_num_seqs=8, max_share_per_salt=0.5)
    own = [request(f"a{number}", 100, 60, "a") for number in range(9)]  # of 10 pages each, so two at a time
    engine.add([*own, large := request("large", 100, 140, "a"), small := request("small", 10, 5, "a")])
    for _ in range(12):
        engine.step()
    scheduler = engine._scheduler
    assert len(scheduler.running) == 2 and scheduler.cache.num_pages_of(scheduler.running[0].table.tenant) <= 20
    engine.add([request("b", 100, 5, "b"), request("c", 100, 5, None)])
    begun, ended = dict[str, None](), []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
        begun |= dict.fromkeys(one.request.request_id for one in scheduler.running if one.request.cache_salt == "a")
    assert set(ended[:2]) == {"b", "c"}
    assert list(begun) == [one.request_id for one in (*own, large, small)], "a waits in its own order"
    engine.integrity_check()


def test_a_request_beyond_its_share_is_refused_by_the_name_of_the_option() -> None:
    engine, _ = caching_engine(num_pages=40, max_model_len=700, max_share_per_salt=0.5)
    with pytest.raises(
        CapacityError,
        match=r"may need 21 KV pages \(21 bytes\), and those of one cache_salt hold at most 20 \(20 bytes\) by "
        r"max_share_per_salt 0\.5; raise it, or lower max_tokens to 21$",
    ):
        engine.add([request("large", 300, 22, "a")])
    with pytest.raises(CapacityError, match="raise it, or shorten the prompt"):
        engine.add([request("larger", 340, 10, None)])
    engine.add([request("fits", 300, 21, "a")])
    assert len(drain(engine)) == 21


def test_answers_of_one_tenant_that_become_longer_than_expected_come_to_their_end() -> None:
    """They wait for each other, but for the first, and nobody has to be preempted for it."""
    engine, _ = caching_engine(num_pages=100, max_model_len=600, max_num_seqs=8, max_share_per_salt=0.4)
    engine.add([request(f"a{number}", 20, 500, "a", is_known=False) for number in range(4)])
    others = iter(range(10**6))
    lacked, beside, outputs = False, set[str](), []
    while any(one.request.cache_salt == "a" for one in engine._scheduler.running + engine._scheduler.waiting):
        if len(engine._scheduler.running) < 6:  # b never stops
            engine.add([request(f"b{next(others)}", 20, 30, "b")])
        before = {one.request.request_id for one in engine._scheduler.running}
        outputs += engine.step()
        if lacked:
            beside |= {one.request.request_id for one in engine._scheduler.running} - before
        lacked = any(one.lacks_share for one in engine._scheduler.running)
    ended = [output for output in outputs if output.finish_reason and output.request_id.startswith("a")]
    assert len(ended) == 4 and engine.stats().num_preemptions == 0
    assert any(name.startswith("b") for name in beside), "others begin meanwhile"
    drain(engine)
    engine.integrity_check()


def test_what_an_earlier_process_left_counts_for_whoever_takes_it_up(tiny_model: Path, tmp_path: Path) -> None:
    prompt, params = random_prompt(6 * PAGE_SIZE + 1, 1), SamplingParams(temperature=0, max_tokens=1)
    options = tiered_options((40, 40, 40), tmp_path, max_share_per_salt=0.5)
    for is_known in (False, True):
        with LLM(tiny_model, **options) as llm:
            index = idle_engine(llm)._cache.index
            assert [page.tenant for page in index] == [None] * 6 * is_known
            [output] = llm.generate([prompt], params, cache_salt="a", use_tqdm=False)
            assert output.num_cached_tokens_by_tier["disk"] == 6 * PAGE_SIZE * is_known
            idle_engine(llm).integrity_check()
            assert [page.tenant for page in index] == [root_key(llm.info.fingerprint, "a")] * 6


def test_a_share_of_less_than_a_page_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_share_per_salt 0\.01 of the 40 KV pages of the device is less"):
        LLM(tiny_model, **tiered_options((40, 0, 0), max_share_per_salt=0.01))
