"""Engine and scheduler against a plain model of memory: whatever happens, each sequence reads back its own tokens."""

import random

import pytest
import torch
from torch import Tensor

from distkv.engine import Engine
from distkv.errors import CapacityError
from distkv.messages import EngineInfo, EngineRequest
from distkv.sampling_params import SamplingParams
from distkv.workers.step_plan import SequencePlan, StepPlan

PAGE_SIZE, VOCAB, EOS = 16, 50, 2


class Memory:
    """Pages of tokens instead of keys and values; a step plan is all it is told."""

    def __init__(self, info: EngineInfo):
        self.info = info
        self.pages: list[list[int | None]] = [[None] * PAGE_SIZE for _ in range(info.num_pages)]
        self.read: list[list[int | None]] = []  # what the sequences of the last step find in their pages

    def execute(self, plan: StepPlan) -> Tensor:
        for source, target in plan.copies:
            self.pages[target] = list(self.pages[source])
        for slot in plan.clear:
            self.pages[slot] = [None] * PAGE_SIZE
        assert 0 < sum(len(one.token_ids) for one in plan.sequences) <= self.info.max_num_batched_tokens
        for one in plan.sequences:
            for position, token in enumerate(one.token_ids, one.start):
                self.pages[one.slots[position // PAGE_SIZE]][position % PAGE_SIZE] = token
        self.read = [self.tokens_of(one) for one in plan.sequences]
        return torch.randn(sum(one.num_logits for one in plan.sequences), VOCAB)

    def tokens_of(self, one: SequencePlan) -> list[int | None]:
        places = range(one.start + len(one.token_ids))
        return [self.pages[one.slots[place // PAGE_SIZE]][place % PAGE_SIZE] for place in places]


@pytest.mark.parametrize("seed", range(12))
def test_random_requests_forks_and_aborts(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    info = EngineInfo(
        max_model_len=100, max_num_seqs=rng.choice([4, 8]), max_num_batched_tokens=rng.choice([8, 17, 40]),
        page_size=PAGE_SIZE, num_pages=rng.choice([12, 20, 40]), page_bytes=1, pool_bytes=1, kv_bytes_per_token=1,
        vocab_size=VOCAB, eos_token_ids=(EOS,), seed=0,
    )  # fmt: skip
    memory = Memory(info)
    engine = Engine(info, memory.execute)
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
                assert info.num_pages == 12, "only the smallest pool may be too small"
        if requests and rng.random() < 0.08:
            request_id, index = rng.choice(list(requests)), rng.choice([None, 0, 1])
            engine.abort([(request_id, index)])
            aborted.add(request_id)
        running_before = len(engine._scheduler.running)
        for output in engine.step():
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
        engine._scheduler.allocator.integrity_check()

    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                ended[output.request_id, output.index] = output.finish_reason
    engine.integrity_check()
    assert len(requests) > 20
    for request_id, request in requests.items():
        if request_id not in aborted:
            assert {index for one, index in ended if one == request_id} == set(range(request.params.n))


def test_a_long_prompt_and_short_ones_all_move_on() -> None:
    """Decodes go first, and a prompt that has begun takes the rest of each step."""
    info = EngineInfo(
        max_model_len=1000, max_num_seqs=8, max_num_batched_tokens=32, page_size=PAGE_SIZE, num_pages=200, page_bytes=1,
        pool_bytes=1, kv_bytes_per_token=1, vocab_size=VOCAB, eos_token_ids=(), seed=0,
    )  # fmt: skip
    engine = Engine(info, Memory(info).execute)
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
