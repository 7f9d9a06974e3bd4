"""Engine and scheduler against a plain model of memory: whatever happens, each sequence reads back its own tokens."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed
from distkv.errors import CapacityError
from distkv.sampling_params import SamplingParams
from distkv.storage.tier import Tier, Transfer, decode_location
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import PageDirectory, SequenceStep

PAGE_SIZE, VOCAB, EOS = 16, 50, 2


class Memory:
    """Pages of tokens instead of keys and values, in three tiers; a step plan is all it is told.

    Transfers end in a later step than they began, unless the plan waits for them, and those of the disk fail now and
    then, as do reads of a step from it.
    """

    def __init__(self, info: EngineInfo, seed: int = 0, fault_rate: float = 0.0, takes_writes: bool = False):
        """`takes_writes` has the disk fail in reading alone."""
        self.info = info
        self.random = random.Random(seed)
        self.fault_rate, self.takes_writes = fault_rate, takes_writes
        self.tiers: list[list[list[int | None] | None]] = [
            [[None] * PAGE_SIZE for _ in range(count)]
            for count in (info.num_pages, info.num_host_pages, info.num_disk_pages)
        ]
        self.directory = PageDirectory(PAGE_SIZE)
        self.on_their_way: list[Transfer] = []
        self.read: list[list[int | None]] = []  # what the sequences of the last step find in their pages
        self.bytes_moved: Counter[str] = Counter()

    def execute(self, plan: StepPlan, drawn: Tensor | None) -> tuple[Tensor | None, Report]:
        report = Report()
        resolve_draws(plan, drawn)
        steps = self.directory.update(plan)
        for transfer in plan.transfers:
            slot = transfer.target, transfer.target_slot
            if not any((one.source, one.source_slot) == slot for one in self.on_their_way):  # those end first
                self.tiers[transfer.target][transfer.target_slot] = None  # neither the old page nor the new one
            self.on_their_way.append(transfer)
        for transfer in list(self.on_their_way):
            if transfer.id in plan.await_ids or self.random.random() < 0.3:
                self.end(transfer, report)
        device = self.tiers[Tier.DEVICE]
        for source, target in plan.copies:
            device[target] = list(self.page(source))
        for slot in plan.clear:
            device[slot] = [None] * PAGE_SIZE
        assert sum(len(one.token_ids) for one in steps) <= max(self.info.max_num_batched_tokens, PAGE_SIZE)
        for one in steps:
            for position, token in enumerate(one.token_ids, one.start):
                self.page(one.pages[position // PAGE_SIZE])[position % PAGE_SIZE] = token
        self.read = []
        for one in steps:
            on_disk = [slot for tier, slot in map(decode_location, one.pages) if tier is Tier.DISK]
            bad = [slot for slot in on_disk if self.random.random() < self.fault_rate / 20]
            report.bad_reads += [(slot, "it is damaged") for slot in bad]
            if not bad:
                self.read.append(self.tokens_of(one))
        wanted = sum(one.num_logits for one in steps)
        return torch.randn(wanted, VOCAB) if steps else None, report

    def end(self, transfer: Transfer, report: Report) -> None:
        self.on_their_way.remove(transfer)
        may_fail = transfer.source is Tier.DISK or (transfer.target is Tier.DISK and not self.takes_writes)
        if may_fail and self.random.random() < self.fault_rate:
            report.failed.append((transfer.id, "the disk is full"))
            return
        content = self.tiers[transfer.source][transfer.source_slot]
        assert content is not None and None not in content, "only full pages move"
        self.tiers[transfer.target][transfer.target_slot] = list(content)
        report.done.append(transfer.id)
        if transfer.target is Tier.DISK:
            report.checksums[transfer.id] = b""
        self.bytes_moved[f"{transfer.source.name} to {transfer.target.name}"] += 1

    def page(self, place: int) -> list[int | None]:
        tier, slot = decode_location(place)
        content = self.tiers[tier][slot]
        assert content is not None
        return content

    def tokens_of(self, one: SequenceStep) -> list[int | None]:
        places = range(one.start + len(one.token_ids))
        return [self.page(one.pages[place // PAGE_SIZE])[place % PAGE_SIZE] for place in places]


def resolve_draws(plan: StepPlan, drawn: Tensor | None) -> None:
    """Puts in the tokens that a plan refers to."""
    assert (drawn is None) == (plan.num_sampled == 0)
    tokens = [] if drawn is None else drawn.tolist()
    assert len(tokens) == plan.num_sampled
    for part in plan.sequences:
        part.token_ids[:] = [token if token >= 0 else tokens[-1 - token] for token in part.token_ids]


def engine_info(**options: Any) -> EngineInfo:
    fields: dict[str, Any] = {
        "max_model_len": 100, "max_num_seqs": 8, "max_num_batched_tokens": 40, "page_size": PAGE_SIZE, "num_pages": 40,
        "num_host_pages": 0, "num_disk_pages": 0, "page_bytes": 1, "pool_bytes": 1, "kv_bytes_per_token": 1,
        "vocab_size": VOCAB, "eos_token_ids": (EOS,), "seed": 0, "cache_dir": None,
    }  # fmt: skip
    return EngineInfo(**(fields | options))


def drain(engine: Engine) -> list[Any]:
    """All outputs to the end."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


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
    engine = Engine(info, memory.execute, survives=False)
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


def test_forks_take_no_more_pages_than_they_need() -> None:
    """A full last page is shared, and what ended answers were to copy is given up."""
    info = engine_info(num_pages=2, max_num_batched_tokens=40, eos_token_ids=())
    engine = Engine(info, Memory(info).execute)
    two = SamplingParams(n=2, temperature=1.0)
    engine.add([EngineRequest("full", [5] * 32, two, 1, 0)])
    assert [output.finish_reason for output in drain(engine)] == ["length"] * 2
    engine.add([EngineRequest(name, [5] * 10, two, 1, 0) for name in "ab"])
    ended = drain(engine)
    assert [(output.request_id, output.finish_reason) for output in ended] == [
        (name, "length") for name in "ab" for _ in range(2)
    ]
    engine.integrity_check()


@pytest.mark.parametrize("first", [0, pytest.param(150, marks=pytest.mark.slow)])
def test_small_windows_with_a_disk_that_loses_pages(first: int) -> None:
    """What `check` admits is answered, however small the window, with forks, aborts and pages that are lost at any
    time; and nothing waits for ever."""
    recomputed = 0
    for seed in range(first, 4000 if first else 150):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        has_tiers, budget = rng.random() < 0.7, rng.choice([8, 16, 24, 40, 64])
        info = engine_info(
            num_pages=rng.randint(2, 9), num_host_pages=rng.randint(1, 10) if has_tiers else 0,
            num_disk_pages=rng.choice([0, 40]) if has_tiers else 0, max_num_seqs=rng.randint(1, min(8, budget)),
            max_num_batched_tokens=budget, max_model_len=600,
        )  # fmt: skip
        memory = Memory(info, seed, fault_rate=rng.choice([0.0, 0.3]), takes_writes=True)
        engine = Engine(info, memory.execute, survives=False)
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
    assert recomputed > 10
