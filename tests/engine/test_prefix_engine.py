"""Engine with prefix caching against a model of memory in which each place knows all tokens before it: a page that is
taken for another one, of a neighbour, a former request or another tenant, is noticed by whoever reads it."""

import random
from typing import Any

import pytest
import torch
from support.history import History, caching_engine
from support.memory import PAGE_SIZE

from distkv.engine.protocol import EngineRequest, RequestFailed, TokenOutput
from distkv.errors import CapacityError
from distkv.sampling_params import SamplingParams


def simulate(seed: int) -> dict[str, int]:
    """Few prompts of a small vocabulary that begin alike, under two salts and none, with follow-ups, forks, aborts,
    resets, tiers of any size and a disk that fails, with a choice of what to load that is as bad as any."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    has_tiers, budget = rng.random() < 0.8, rng.choice([8, 16, 24, 40, 64])
    fault_rate = rng.choice([0.0, 0.0, 0.2])
    engine, memory = caching_engine(
        {"seed": seed, "fault_rate": fault_rate, "takes_writes": rng.random() < 0.5},
        num_pages=rng.randint(3, 14), num_host_pages=rng.randint(1, 14) if has_tiers else 0,
        num_disk_pages=rng.choice([0, 3, 12, 60]) if has_tiers else 0, max_num_seqs=rng.randint(1, min(8, budget)),
        max_num_batched_tokens=budget, max_model_len=300, write_through=rng.random() < 0.5,
        max_cold_bytes_per_step=rng.choice([0, 0, 1, 4]), disk_cost=rng.choice([1.0, 3.0]), eos_token_ids=(2,),
    )  # fmt: skip
    if rng.random() < 0.3:  # some known pages are computed again
        choice: Any = engine._scheduler.load_choice
        choice.worth_taking = lambda found: found[: rng.randint(-2, 2) % (len(found) + 1)]
    stems = [[rng.randint(3, 5) for _ in range(rng.randint(1, 80))] for _ in range(3)]
    finished: list[list[int]] = []
    requests: dict[str, EngineRequest] = {}
    answers: dict[tuple[str, int], list[int]] = {}
    ended: dict[str, set[int]] = {}
    gone: set[str] = set()
    count = {"hits": 0, "resets": 0, "failed": 0}
    for turn in range(4000):
        if len(requests) < 14 and rng.random() < 0.12:
            stem = rng.choice(finished) if finished and rng.random() < 0.4 else rng.choice(stems)
            prompt = stem[: rng.randint(1, len(stem))] + [rng.randint(3, 4) for _ in range(rng.randint(0, 20))]
            request = EngineRequest(
                str(len(requests)), prompt[:150], SamplingParams(n=rng.choice([1, 1, 1, 2, 3]), temperature=1.0),
                rng.choice([1, 2, rng.randint(1, 60)]), seed=rng.randrange(9), priority=rng.choice([0, 0, 0, -1, 1]),
                cache_salt=rng.choice([None, None, "a", "b"]),
            )  # fmt: skip
            try:
                engine.add([request])
                requests[request.request_id] = request
            except CapacityError:
                continue
        if requests and rng.random() < 0.02:
            request_id, index = rng.choice(list(requests)), rng.choice([None, None, 0, 1])
            engine.abort([(request_id, index)])
            gone.add(request_id)
        if rng.random() < 0.01:
            engine.reset_prefix_cache()
            count["resets"] += 1
            engine._cache.integrity_check()
        for output in engine.step():
            if isinstance(output, RequestFailed):
                assert fault_rate and output.error in ("StoreError", "CapacityError"), output
                gone.add(output.request_id)
                count["failed"] += 1
                continue
            check_output(output, requests[output.request_id], answers, memory)
            count["hits"] += sum(output.num_cached_tokens)
            if output.finish_reason:
                ended.setdefault(output.request_id, set()).add(output.index)
                finished.append(requests[output.request_id].prompt_token_ids + answers[output.request_id, output.index])
        if turn % 7 == 0:
            engine._cache.integrity_check()
        if len(requests) == 14 and not engine.has_work:
            break
    else:
        raise AssertionError("it does not come to an end")
    for request_id, request in requests.items():
        assert request_id in gone or ended[request_id] == set(range(request.params.n))
    engine.integrity_check()
    engine.close()
    return count


def check_output(
    output: TokenOutput, request: EngineRequest, answers: dict[tuple[str, int], list[int]], memory: History
) -> None:
    """An answer's first token tells what was found: whole pages, never the last token, and they were not run."""
    answer = answers.setdefault((output.request_id, output.index), [])
    found = sum(output.num_cached_tokens)
    if not answer:
        assert all(count % PAGE_SIZE == 0 for count in output.num_cached_tokens)
        [table] = [
            number
            for number, owner in memory.owners.items()
            if owner.request is request and number in memory.begun and memory.begun[number] < len(owner.token_ids)
            if not owner.index
        ]
        lost = PAGE_SIZE * memory.owners[table].cached_tiers.count(None)  # damaged, and computed again since
        assert found < len(request.prompt_token_ids) and memory.begun[table] == found + lost
    else:
        assert not found, "told once"
    answer.append(output.token_id)


@pytest.mark.parametrize("first", [0, pytest.param(30, marks=pytest.mark.slow)])
def test_each_sequence_reads_its_own_history(first: int) -> None:
    total = {"hits": 0, "resets": 0, "failed": 0}
    for seed in range(first, 4000 if first else 30):
        try:
            counts = simulate(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        total = {name: total[name] + counts[name] for name in total}
    assert total["hits"] > 700 and total["resets"] > 7
