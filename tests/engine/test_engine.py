"""Engine and scheduler against a plain model of memory: whatever happens, each sequence reads back its own tokens."""

import random

import pytest
import torch
from support.memory import VOCAB, Memory, drain, engine_info

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, RequestFailed
from distkv.errors import CapacityError
from distkv.sampling_params import SamplingParams
from distkv.workers.group.rank_executor import RankExecutor


@pytest.mark.parametrize(
    "tiers, fault_rate",
    [((0, 0), 0.0), ((20, 0), 0.0), ((8, 40), 0.0), ((8, 40), 0.2)],
    ids=["device", "host", "disk", "failing disk"],
)
@pytest.mark.parametrize("seed", range(8))
def test_random_requests_forks_and_aborts(seed: int, tiers: tuple[int, int], fault_rate: float) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [12, 20, 40] if tiers == (0, 0) else [7, 9, 12]
    info = engine_info(
        max_num_seqs=rng.choice([4, 8]), max_num_batched_tokens=rng.choice([8, 17, 40]), num_pages=rng.choice(sizes),
        num_host_pages=tiers[0], num_disk_pages=tiers[1],
    )  # fmt: skip
    memory = Memory(info, seed, fault_rate)
    engine = Engine(info, RankExecutor(memory.execute), survives=False)
    answers: dict[tuple[str, int], list[int]] = {}
    requests: dict[str, EngineRequest] = {}
    aborted: set[str] = set()
    ended: dict[tuple[str, int], str] = {}

    for step in range(400):
        if step < 300 and rng.random() < 0.2:
            prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 60))]
            params = SamplingParams(n=rng.choice([1, 1, 2, 3]), temperature=1.0)
            request = EngineRequest(str(step), prompt, params, max_tokens=rng.randint(1, 40), seed=step)
            try:
                engine.add([request])
                requests[request.request_id] = request
            except CapacityError:
                assert info.num_pages <= 12 or fault_rate, "only the smallest pools may be too small"
        if requests and rng.random() < 0.08:
            request_id, index = rng.choice(list(requests)), rng.choice([None, 0, 1])
            engine.abort([(request_id, index)])
            aborted.add(request_id)
        running_before = len(engine._scheduler.running)
        for output in engine.step():
            if isinstance(output, RequestFailed):
                assert fault_rate
                aborted.add(output.request_id)
                continue
            key = output.request_id, output.index
            assert key not in ended
            answers.setdefault(key, []).append(output.token_id)
            if output.finish_reason:
                ended[key] = output.finish_reason
        assert running_before <= info.max_num_seqs
        known = [request.prompt_token_ids for request in requests.values()]
        for tokens in memory.read:
            assert any(
                tokens == (request.prompt_token_ids + answers.get((request.request_id, index), []))[: len(tokens)]
                for request in requests.values()
                for index in range(request.params.n)
            ), (tokens, known)
        memory.read = []
        engine._cache.integrity_check()

    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestFailed):
                aborted.add(output.request_id)
            elif output.finish_reason:
                ended[output.request_id, output.index] = output.finish_reason
    engine.integrity_check()
    assert len(requests) > 20
    assert len(requests) > 2 * len([one for one in aborted if one in requests]) or fault_rate
    if tiers[0]:
        assert memory.bytes_moved["DEVICE to HOST"]
    if tiers[1]:
        assert memory.bytes_moved["HOST to DISK"]
    for request_id, request in requests.items():
        if request_id not in aborted:
            assert {index for one, index in ended if one == request_id} == set(range(request.params.n))


def test_a_long_prompt_and_short_ones_all_move_on() -> None:
    """Decodes go first, and a prompt that has begun takes the rest of each step."""
    info = engine_info(max_model_len=1000, max_num_batched_tokens=32, num_pages=200, eos_token_ids=())
    engine = Engine(info, RankExecutor(Memory(info).execute))
    params = SamplingParams(temperature=0)
    engine.add([EngineRequest(str(number), [5] * 4, params, 50, 0) for number in range(4)])
    engine.step()
    engine.add([EngineRequest("long", [6] * 500, params, 5, 0)])
    for _ in range(40):
        drawn = {output.request_id for output in engine.step()}
        assert drawn >= {"0", "1", "2", "3"}, "no decode waits for the prompt"
        if "long" in drawn:
            break
    else:
        pytest.fail("the long prompt was starved")


def test_forks_take_no_more_pages_than_they_need() -> None:
    """A full last page is shared, and what ended answers were to copy is given up."""
    info = engine_info(num_pages=2, max_num_batched_tokens=40, eos_token_ids=())
    engine = Engine(info, RankExecutor(Memory(info).execute))
    two = SamplingParams(n=2, temperature=1.0)
    engine.add([EngineRequest("full", [5] * 32, two, 1, 0)])
    assert [output.finish_reason for output in drain(engine)] == ["length"] * 2
    engine.add([EngineRequest(name, [5] * 10, two, 1, 0) for name in "ab"])
    ended = drain(engine)
    assert [(output.request_id, output.finish_reason) for output in ended] == [
        (name, "length") for name in "ab" for _ in range(2)
    ]
    engine.integrity_check()


@pytest.mark.parametrize("first", [0, pytest.param(60, marks=pytest.mark.slow)])
def test_small_windows_with_a_disk_that_loses_pages(first: int) -> None:
    """What `check` admits is answered, however small the window, with forks, aborts and pages that are lost at any
    time; and nothing waits for ever."""
    recomputed = 0
    for seed in range(first, 4000 if first else 60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        has_tiers, budget = rng.random() < 0.7, rng.choice([8, 16, 24, 40, 64])
        info = engine_info(
            num_pages=rng.randint(2, 9), num_host_pages=rng.randint(1, 10) if has_tiers else 0,
            num_disk_pages=rng.choice([0, 40]) if has_tiers else 0, max_num_seqs=rng.randint(1, min(8, budget)),
            max_num_batched_tokens=budget, max_model_len=600,
        )  # fmt: skip
        memory = Memory(info, seed, fault_rate=rng.choice([0.0, 0.3]), takes_writes=True)
        engine = Engine(info, RankExecutor(memory.execute), survives=False)
        taken = 0
        for _ in range(3000):
            if rng.random() < 0.1 and taken < 10:
                prompt = [5] * rng.choice([rng.randint(1, 120), 16 * rng.randint(1, 6)])
                params = SamplingParams(n=rng.choice([1, 1, 2, 3]), temperature=1.0, ignore_eos=True)
                try:
                    engine.add(
                        [EngineRequest(str(taken), prompt, params, rng.choice([1, 1, 2, rng.randint(1, 60)]), 0)]
                    )
                except CapacityError:
                    continue
                taken += 1
            if rng.random() < 0.02 and taken:
                engine.abort([(str(rng.randrange(taken)), rng.choice([None, 0, 1]))])
            for output in engine.step():
                # a page may be lost once too often; there is always room
                assert not isinstance(output, RequestFailed) or output.error == "StoreError", (seed, output)
            if taken == 10 and not engine.has_work:
                break
        else:
            assert not engine.has_work, f"seed {seed} does not come to an end"
        engine.integrity_check()
        recomputed += engine.stats().pages_recomputed
    assert recomputed > 5
