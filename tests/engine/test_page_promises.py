"""Requests share a pool that could not hold each of them at its full length."""

import random

import pytest
import torch
from support.history import caching_engine
from support.memory import PAGE_SIZE, drain

from distkv.engine.protocol import EngineRequest, RequestFailed
from distkv.sampling_params import SamplingParams


def request(name: object, prompt_len: int, max_tokens: int, is_known: bool = False, n: int = 1) -> EngineRequest:
    params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens if is_known else None, ignore_eos=True)
    prompt = random.Random(str(name)).choices(range(3, 50), k=prompt_len)
    return EngineRequest(str(name), prompt, params, max_tokens, seed=1)


def test_requests_of_unknown_length_run_together_in_a_pool_of_one_model_length() -> None:
    model_len = 40 * PAGE_SIZE
    engine, _ = caching_engine(num_pages=40, max_model_len=model_len, max_num_seqs=24, max_num_batched_tokens=64)
    engine.add([request(number, 8, model_len - 8) for number in range(24)])
    for _ in range(8):
        engine.step()
    assert engine.stats().num_running == 24
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("is_known", [True, False])
def test_long_answers_wait_for_each_other_and_all_come_to_their_end(is_known: bool) -> None:
    """Four answers that are two pools long together; nothing is read again where their lengths are known."""
    engine, _ = caching_engine(num_pages=48, max_model_len=900, max_num_seqs=8)
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


def test_one_whose_length_is_known_is_never_preempted() -> None:
    engine, _ = caching_engine(num_pages=30, max_model_len=480, max_num_seqs=8)
    engine.add([request("known", 20, 200, is_known=True), *(request(number, 20, 440) for number in range(3))])
    known = engine._scheduler.waiting[0]
    assert sum(output.request_id == "known" for output in drain(engine)) == 200
    assert engine.stats().num_preemptions > 0
    assert not known.was_preempted


def test_answers_that_were_preempted_can_be_aborted() -> None:
    engine, _ = caching_engine(num_pages=30, max_model_len=480, max_num_seqs=8)
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
    """Everything ends with the tokens that it asked for, over random pools, tiers, forks, priorities and aborts; pages
    hold what they should (the memory looks)."""
    preempted = 0
    for seed in range(first, first + (300 if first else 12)):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        has_tiers = rng.random() < 0.5
        engine, _ = caching_engine(
            {"seed": seed, "fault_rate": rng.choice([0.0, 0.2]), "takes_writes": True},
            num_pages=rng.randint(14, 34), num_host_pages=rng.randint(1, 8) if has_tiers else 0,
            num_disk_pages=rng.choice([0, 8]) if has_tiers else 0, max_num_seqs=rng.randint(1, 8),
            max_num_batched_tokens=rng.choice([16, 40, 64]), max_model_len=1000,
            enable_prefix_caching=rng.random() < 0.7,
        )  # fmt: skip
        wanted: dict[tuple[str, int], int] = {}
        for number in range(8):
            one = request(
                f"{seed} {number}", rng.randint(1, 120), rng.choice([rng.randint(1, 100), 400]), rng.random() < 0.3,
                rng.choice([1, 1, 2, 3]),
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
    assert preempted > 3
