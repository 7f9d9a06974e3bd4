"""Requests share a pool that could not hold each of them at its full length."""

import random
from typing import Any

import pytest
import torch
from support.history import caching_engine
from support.memory import PAGE_SIZE, drain, expect_short_answers

from distkv.engine.answer_lengths import FIRST_GUESS, NUM_KEPT, AnswerLengths
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, RequestFailed
from distkv.engine.sequence import Sequence
from distkv.sampling_params import SamplingParams
from distkv.storage.paging import pages_for
from distkv.workers.sampling.sampled_token import NO_TOKEN, SampledToken


def request(
    name: object, prompt_len: int, max_tokens: int, is_known: bool = False, n: int = 1, start: str = "", **options: Any
) -> EngineRequest:
    """Prompts of one `start` begin alike."""
    params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens if is_known else None, ignore_eos=True)
    shared = random.Random(start).choices(range(3, 50), k=random.Random(start).randint(30, 100)) if start else []
    prompt = shared + random.Random(str(name)).choices(range(3, 50), k=prompt_len)
    return EngineRequest(str(name), prompt, params, max_tokens, seed=1, **options)


def promising_engine(**sizes: int) -> Engine:
    """An engine that lets more requests begin than there is room for."""
    engine, _ = caching_engine(**sizes)
    expect_short_answers(engine)
    return engine


def test_requests_of_unknown_length_run_together_in_a_pool_of_one_model_length() -> None:
    model_len = 40 * PAGE_SIZE
    engine = promising_engine(num_pages=40, max_model_len=model_len, max_num_seqs=24, max_num_batched_tokens=64)
    engine.add([request(number, 8, model_len - 8) for number in range(24)])
    for _ in range(8):
        engine.step()
    assert engine.stats().num_running == 24
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("is_known, fewest", [(False, 12), (True, 6)])
def test_a_request_begins_where_all_are_likely_to_have_room(is_known: bool, fewest: int) -> None:
    """Answers of twenty tokens are expected once some had that many. One whose limit is known is sure to reach that, so
    that fewer of them run beside each other."""
    engine, _ = caching_engine(num_pages=48, max_model_len=600, max_num_seqs=64)
    engine.add([request(number, 20, 500, is_known) for number in range(64)])
    engine.step()
    first = len(engine._scheduler.running)
    most, lacking = first, 0
    left = dict.fromkeys(map(str, range(64)), 20)
    while engine.has_work:
        for output in engine.step():
            left[output.request_id] -= 1
        ended = [name for name, count in left.items() if not count]
        engine.abort([(name, None) for name in ended], "stop")
        for name in ended:
            del left[name]
        most = max(most, len(engine._scheduler.running))
        lacking = max(lacking, engine.stats().num_lacking_room)
    assert 0 < first * pages_for(20 + FIRST_GUESS, PAGE_SIZE) <= 48, "nothing is known of them yet"
    assert fewest <= most <= 48 / pages_for(20 + 20, PAGE_SIZE)
    assert (is_known or not lacking) and not engine.stats().num_preemptions


def test_lengths_that_are_expected() -> None:
    lengths = AnswerLengths()
    assert (lengths.expected(0), lengths.expected(1000)) == (FIRST_GUESS, 2000)
    for length in (10, 30, 20):
        lengths.add(length)
    assert lengths.expected(0) == (60 + FIRST_GUESS) // 4
    assert lengths.expected(10) == (50 + 10 + FIRST_GUESS) // 3, "of those that became longer"
    assert lengths.expected(30) == 30 + FIRST_GUESS
    for _ in range(NUM_KEPT):
        lengths.add(5)
    assert lengths.expected(10) == 10 + FIRST_GUESS, "the older ones are forgotten"
    assert lengths.expected(0) == (5 * NUM_KEPT + FIRST_GUESS) // (NUM_KEPT + 1)


@pytest.mark.parametrize("is_known", [True, False])
def test_long_answers_wait_for_each_other_and_all_come_to_their_end(is_known: bool) -> None:
    """Four answers that are two pools long together; nothing is read again where their lengths are known."""
    engine = promising_engine(num_pages=48, max_model_len=900, max_num_seqs=8)
    engine.add([request(number, 20, 370, is_known) for number in range(4)])
    most, outputs = 0, []
    while engine.has_work:
        outputs += engine.step()
        most = max(most, engine.stats().num_running)
    assert most > 1, "they run beside each other"
    assert len(outputs) == 4 * 370
    assert sum(output.finish_reason == "length" for output in outputs) == 4
    if is_known:
        assert engine.stats().num_preemptions == 0
    else:
        assert 0 < engine.stats().num_preemptions <= 4, "each gives its pages up once at most"
    engine.integrity_check()


def test_one_that_waited_for_pages_and_is_gone_keeps_nobody_waiting() -> None:
    engine = promising_engine(num_pages=30, max_model_len=480, max_num_seqs=8)
    engine.add([request(number, 20, 400, is_known=True) for number in range(2)])
    while not any(one.lacks_room for one in engine._scheduler.running):
        engine.step()
    engine.add([request("later", 20, 10, is_known=True)])
    engine.abort([("0", None), ("1", None)])
    scheduler = engine._scheduler
    assert not scheduler.running and scheduler._promises.may_begin([], scheduler.waiting[0], [])
    outputs = drain(engine)
    assert [output.request_id for output in outputs] == ["later"] * 10
    assert not any(isinstance(output, RequestFailed) for output in outputs)


def test_one_whose_length_is_known_is_never_preempted() -> None:
    engine = promising_engine(num_pages=30, max_model_len=480, max_num_seqs=8)
    engine.add([request("known", 20, 200, is_known=True), *(request(number, 20, 440) for number in range(3))])
    known = engine._scheduler.waiting[0]
    assert sum(output.request_id == "known" for output in drain(engine)) == 200
    assert engine.stats().num_preemptions > 0
    assert not known.was_preempted


def test_answers_that_were_preempted_can_be_aborted() -> None:
    engine = promising_engine(num_pages=30, max_model_len=480, max_num_seqs=8)
    engine.add([request(number, 20, 440) for number in range(3)])
    while not engine.stats().num_preemptions:
        engine.step()
    [waiting] = engine._scheduler.waiting
    assert waiting.num_output_tokens
    engine.abort([(waiting.request.request_id, 0)])
    ended = {output.request_id for output in drain(engine) if output.finish_reason}
    assert ended == {"0", "1", "2"} - {waiting.request.request_id}
    engine.integrity_check()


@pytest.mark.parametrize("first", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (100, 400))])
def test_random_requests_of_known_and_unknown_length(first: int) -> None:
    """Everything ends with the tokens that it asked for, over random pools, tiers, streaming limits, forks, priorities,
    shared prompts and aborts; pages hold what they should (the memory looks)."""
    preempted = 0
    for seed in range(first, first + (300 if first else 8)):
        rng, tenants = random.Random(seed), random.Random(-seed)
        share = tenants.choice([None, None, 0.4, 0.8])
        torch.manual_seed(seed)
        has_tiers = rng.random() < 0.5
        engine, _ = caching_engine(
            {"seed": seed, "fault_rate": rng.choice([0.0, 0.2]), "takes_writes": True},
            num_pages=rng.randint(20, 36), num_host_pages=rng.randint(1, 8) if has_tiers else 0,
            num_disk_pages=rng.choice([0, 8]) if has_tiers else 0, max_num_seqs=rng.randint(1, 8),
            max_num_batched_tokens=rng.choice([16, 40, 64]), max_model_len=1000,
            enable_prefix_caching=rng.random() < 0.7, max_cold_bytes_per_step=rng.choice([0, 1, 3, 6]),
            max_share_per_salt=share,
        )  # fmt: skip
        if rng.random() < 0.8:
            expect_short_answers(engine)
        wanted: dict[tuple[str, int], int] = {}
        for number in range(8):
            one = request(
                f"{seed} {number}", rng.randint(1, 40), rng.choice([rng.randint(1, 100), 400]), rng.random() < 0.3,
                rng.choice([1, 1, 2, 3]), rng.choice(["", f"{seed} a", f"{seed} b"]), priority=rng.choice([0, 0, 1]),
                cache_salt=tenants.choice([None, "a"]) if share else None,
            )  # fmt: skip
            if one.params.n > engine.info.max_num_seqs:
                continue
            try:
                engine.add([one])
            except Exception as error:
                assert type(error).__name__ == "CapacityError"
                continue
            wanted |= {(one.request_id, index): one.max_tokens for index in range(one.params.n)}
        for _ in range(40000):
            if not engine.has_work:
                break
            for output in engine.step():
                assert not isinstance(output, RequestFailed) or output.error == "StoreError", (seed, output)
                if isinstance(output, RequestFailed):
                    wanted = {key: left for key, left in wanted.items() if key[0] != output.request_id}
                    continue
                wanted[output.request_id, output.index] -= 1
                if output.finish_reason:
                    assert wanted.pop((output.request_id, output.index)) == 0
            if rng.random() < 0.003 and wanted:
                name, index = rng.choice(list(wanted))
                engine.abort([(name, index)])
                del wanted[name, index]
        assert not engine.has_work, f"seed {seed} does not come to an end"
        assert not wanted
        engine.integrity_check()
        preempted += engine.stats().num_preemptions
    assert preempted


def test_an_answer_that_was_dropped_before_it_began_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended once, though another answer of the request cannot go on."""
    engine, _ = caching_engine(num_pages=30)
    engine.add([request("three", 20, 10, is_known=True, n=3), request("other", 20, 10, is_known=True)])
    engine.step()
    engine.abort([("three", 2)])
    extend = engine._answers.extend

    def lacks_numbers(sequence: Sequence, tokens: list[list[SampledToken]]) -> None:
        if sequence.request.request_id == "three":
            tokens = [[(NO_TOKEN, None)], *tokens[1:]]
        extend(sequence, tokens)

    monkeypatch.setattr(engine._answers, "extend", lacks_numbers)
    outputs = drain(engine)
    assert [output.request_id for output in outputs if isinstance(output, RequestFailed)] == ["three"]
    assert sum(output.request_id == "other" for output in outputs) == 10
    engine.integrity_check()


def test_what_could_not_be_read_again_is_promised_in_full() -> None:
    """A device smaller than a step has room for the prompts, and not for prompts with long answers at once."""
    engine, _ = caching_engine(num_pages=12, num_host_pages=28, max_num_batched_tokens=1000, max_model_len=1000)
    engine.add([request(number, 60, 540) for number in range(2)])
    assert len(drain(engine)) == 2 * 540
    assert engine.stats().num_preemptions == 0


def test_the_first_in_line_may_come_while_others_wait_for_pages() -> None:
    engine = promising_engine(num_pages=48, max_model_len=900, max_num_seqs=8)
    engine.add([request(number, 20, 370, is_known=True, priority=1) for number in range(4)])
    while not any(one.lacks_room for one in engine._scheduler.running):
        engine.step()
    engine.add([request("urgent", 20, 5, is_known=True)])
    ended = [output.request_id for output in drain(engine) if output.finish_reason]
    assert ended[0] == "urgent"
