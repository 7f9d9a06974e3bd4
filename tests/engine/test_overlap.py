"""Steps overlap and share: what runs ahead of knowing an answer's end changes nothing, what fails takes nobody along,
and nobody waits for ever."""

import random
from typing import Any

import pytest
import torch
from test_engine import PAGE_SIZE, VOCAB, Memory, drain, engine_info, resolve_draws
from test_prefix_engine import GREEDY, History
from torch import Tensor

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed, TokenOutput
from distkv.sampling_params import SamplingParams
from distkv.storage.tier import Tier, decode_location
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import SequenceStep

EOS = 2


class Speaker(History):
    """Its logits are a function of all tokens so far, so that an answer does not depend on what else runs."""

    def __init__(self, info: EngineInfo, **options: Any):
        super().__init__(info, **options)
        self.poison: tuple[str, int] | None = None  # request and position: a step that runs the token there raises
        self.raises_late = False  # when all that the plan asks for has been done
        self.late_damage: set[int] = set()  # numbers of steps whose disk reads all fail
        self.num_steps = self.num_damaged = 0
        self._started: set[int] = set()  # transfers; one that is told again is passed over
        self._untold = Report()  # of steps that raised
        self._broken: list[list[int]] = []  # slots that each sequence of the step under way could not read

    def execute(self, plan: StepPlan, drawn: Tensor | None) -> tuple[Tensor | None, Report]:
        self.num_steps += bool(plan.sequences)
        resolve_draws(plan, drawn)
        parts = [(self.owners[part.table], part, part.start + len(part.token_ids)) for part in plan.sequences]
        told = [owner.token_ids[: part.start] + part.token_ids for owner, part, _ in parts]
        is_poisoned = any(
            (owner.request.request_id, place) == self.poison
            for owner, part, end in parts
            for place in range(part.start, end)
        )
        if is_poisoned and not self.raises_late:
            raise RuntimeError("poison")
        plan.transfers[:] = [one for one in plan.transfers if one.id not in self._started]
        self._started |= {one.id for one in plan.transfers}
        self._broken = []
        logits, report = super().execute(plan, drawn)
        rows = [
            -speak(tokens) if broken else speak(tokens)
            for tokens, broken, (_, part, _) in zip(told, self._broken, parts, strict=True)
            for _ in range(part.num_logits)
        ]
        report.bad_reads += [(slot, "it is damaged") for broken in self._broken for slot in broken]
        untold, self._untold = self._untold, Report()
        report.done[:0], report.failed[:0] = untold.done, untold.failed
        report.checksums |= untold.checksums
        if is_poisoned:
            self._untold = report
            raise RuntimeError("poison")
        return (torch.stack(rows) if rows else torch.empty(0, VOCAB)) if logits is not None else None, report

    def tokens_of(self, one: SequenceStep) -> list[int | None]:
        cold = [decode_location(place) for place in one.pages.tolist() if place < 0]
        on_disk = [slot for tier, slot in cold if tier is Tier.DISK]
        self._broken.append(on_disk if self.num_steps in self.late_damage else [])
        self.num_damaged += len(self._broken[-1])
        return super().tokens_of(one)


def speak(tokens: list[int]) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


def make(**options: Any) -> tuple[Engine, Speaker]:
    memory_options = options.pop("memory", {})
    info = engine_info(**({"enable_prefix_caching": True, "max_model_len": 1000} | options))
    memory = Speaker(info, **memory_options)
    engine = Engine(info, memory.execute)
    memory.watch(engine)
    return engine, memory


def requests(count: int, params: SamplingParams, max_tokens: int, first: int = 0) -> list[EngineRequest]:
    rng = random.Random(5)
    prompts = [[rng.randrange(10, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(first + count)]
    return [EngineRequest(str(n), prompts[n], params, max_tokens, seed=n) for n in range(first, first + count)]


def answers(outputs: list[Any]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        if isinstance(output, TokenOutput):
            found.setdefault((output.request_id, output.index), []).append(output.token_id)
    return found


def run(added: list[EngineRequest], **options: Any) -> tuple[dict[tuple[str, int], list[int]], list[Any]]:
    engine, _ = make(**options)
    engine.add(added)
    outputs = drain(engine)
    engine.integrity_check()
    return answers(outputs), outputs


# --- one token too many ---


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("tiers", [(0, 0), (40, 200)], ids=["device", "disk"])
def test_the_token_after_the_end_changes_nothing(n: int, tiers: tuple[int, int]) -> None:
    """Answers that end by EOS are the beginning of those that run on to their limit, in a batch and alone; what was
    run behind the end is told to nobody, and found by nobody."""
    sizes = {"num_pages": 40 if tiers == (0, 0) else 12, "num_host_pages": tiers[0], "num_disk_pages": tiers[1]}
    params = SamplingParams(n=n, temperature=1.0)
    endless = SamplingParams(n=n, temperature=1.0, ignore_eos=True)
    ending, outputs = run(requests(6, params, 80), **sizes)
    whole, _ = run(requests(6, endless, 80), **sizes)
    assert ending.keys() == whole.keys()
    stopped = 0
    for key, tokens in ending.items():
        assert tokens == whole[key][: len(tokens)]
        assert EOS not in tokens[:-1] and (tokens[-1] == EOS or len(tokens) == 80)
        stopped += tokens[-1] == EOS
    assert stopped >= 3
    reasons = [one.finish_reason for one in outputs if one.finish_reason]
    assert reasons.count("stop") == stopped and len(reasons) == 6 * n
    for number in range(6):
        alone, _ = run(requests(1, params, 80, first=number), **sizes)
        assert alone == {key: tokens for key, tokens in ending.items() if key[0] == str(number)}


def test_what_ran_past_an_end_is_not_found() -> None:
    """The page that a dropped token would have filled is not kept under a name."""
    for length in range(1, 2 * PAGE_SIZE + 2):
        engine, _ = make(eos_token_ids=tuple(range(VOCAB)))
        prompt = list(range(10, 10 + length))
        engine.add([EngineRequest("0", prompt, SamplingParams(temperature=0), 50, 0)])
        [output] = drain(engine)
        assert output.finish_reason == "stop"
        assert engine.stats().idle_pages == length // PAGE_SIZE
        engine.integrity_check()


# --- steps that fail ---


@pytest.mark.parametrize("raises_late", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_poisoned_request_fails_alone(seed: int, raises_late: bool) -> None:
    """Its step raises, before or after the ranks did what it asks for and while the next one is settled: the others
    answer what they would have without it. With forks, known prefixes and tiers."""
    rng = random.Random(seed)
    options = {
        "num_pages": rng.choice([14, 40]), "num_host_pages": 100, "num_disk_pages": rng.choice([0, 100]),
        "max_num_batched_tokens": rng.choice([8, 24, 60]),
    }  # fmt: skip
    params = SamplingParams(n=rng.choice([1, 1, 2]), temperature=1.0, ignore_eos=True)
    healthy = requests(5, params, 30)
    expected, _ = run(healthy, **options)
    engine, memory = make(**options)
    if rng.random() < 0.5:
        engine.add([EngineRequest("before", healthy[0].prompt_token_ids, params, 5, 0)])
        drain(engine)
    prompt = [*range(10, 10 + rng.randint(1, 45)), *range(10, 10 + rng.randint(0, 20))]
    memory.poison, memory.raises_late = ("poisoned", rng.randrange(len(prompt))), raises_late
    mixed = list(healthy)
    mixed.insert(rng.randrange(len(mixed) + 1), EngineRequest("poisoned", prompt, params, 30, 0))
    outputs: list[Any] = []
    for request in mixed:
        engine.add([request])
        outputs += [output for _ in range(rng.randint(0, 3)) for output in engine.step()]
    outputs += drain(engine)
    [failure] = [one for one in outputs if isinstance(one, RequestFailed)]
    assert failure.request_id == "poisoned" and failure.error == "DistKVError" and "poison" in failure.message
    found = answers(outputs)
    assert found == expected
    engine.integrity_check()


def test_a_request_that_becomes_poisonous_later() -> None:
    """By a token of its answer, amid its decode beside others."""
    params = SamplingParams(temperature=1.0, ignore_eos=True)
    expected, _ = run(requests(5, params, 30))
    added = requests(5, params, 30)
    engine, memory = make()
    memory.poison = "2", len(added[2].prompt_token_ids) + 10  # the answer's token of that number
    engine.add(added)
    outputs = drain(engine)
    assert [one.request_id for one in outputs if isinstance(one, RequestFailed)] == ["2"]
    found = answers(outputs)
    assert found.pop(("2", 0)) == expected.pop(("2", 0))[: 10 + 1]
    assert found == expected
    engine.integrity_check()


def test_bad_reads_are_told_when_the_next_step_is_settled() -> None:
    """The step is taken back, and so is the one behind it; the pages are computed again and no answer changes."""
    options = {"num_pages": 8, "num_host_pages": 4, "num_disk_pages": 200, "max_num_batched_tokens": 16}
    damaged = 0
    for seed in range(12):
        params = SamplingParams(n=1 + seed % 2, temperature=1.0, ignore_eos=True)
        added = requests(4, params, 60)
        expected, _ = run(added, **options)
        engine, memory = make(**options)
        memory.late_damage = set(random.Random(seed).sample(range(5, 150), 3))  # a page may be lost three times
        engine.add(added)
        outputs = drain(engine)
        assert not [one for one in outputs if isinstance(one, RequestFailed)]
        assert answers(outputs) == expected
        assert bool(memory.num_damaged) == bool(engine.stats().pages_recomputed)
        damaged += memory.num_damaged
        engine.integrity_check()
    assert damaged > 30


# --- fairness ---

BUDGET = 64


def wait_for(engine: Engine, feed: Any, wanted: str, limit: int) -> int:
    """Steps until a request draws its first token, while `feed` adds others before each step."""
    for step in range(limit):
        feed(step)
        if any(isinstance(one, TokenOutput) and one.request_id == wanted for one in engine.step()):
            return step
    pytest.fail(f"{wanted} did not begin within {limit} steps")


def quiet(**options: Any) -> Engine:
    info = engine_info(
        **({"max_model_len": 5000, "max_num_batched_tokens": BUDGET, "num_pages": 2000, "eos_token_ids": (),
            "max_num_seqs": 40} | options)
    )  # fmt: skip
    return Engine(info, Memory(info).execute, survives=False)


def test_short_prompts_do_not_starve_a_long_one() -> None:
    """The first in line gets half of what decoding leaves at least, whatever else comes: so a prompt of L tokens at the
    head of the line has been read after L / (half of the least budget, on page borders) steps."""
    engine = quiet()
    engine.add([EngineRequest("long", [5] * 2000, GREEDY, 2, 0)])
    numbers = iter(range(10**6))

    def feed(step: int) -> None:  # more than a step holds
        engine.add([EngineRequest(str(next(numbers)), [6] * 30, GREEDY, 2, 0) for _ in range(3)])

    # 3 of them at most have been read per step, and each decodes one token more
    half = (BUDGET - 3) // 2 // PAGE_SIZE * PAGE_SIZE
    steps = wait_for(engine, feed, "long", 1000)
    assert steps <= -(-2000 // half) + 2


def test_a_long_prompt_does_not_starve_short_ones() -> None:
    """Beside the first in line the others share the other half, the one with the fewest tokens to go first."""
    engine = quiet()
    engine.add([EngineRequest("long", [5] * 4000, GREEDY, 2, 0)])
    for _ in range(4):
        engine.step()
    for number in range(20):
        engine.add([EngineRequest(str(number), [6] * 30, GREEDY, 2, 0)])
        # its 30 tokens fit into the half beside the first, which a page border may cut, in one step or two
        assert wait_for(engine, lambda step: None, str(number), 10) <= 3
    assert any(one.request.request_id == "long" and one.in_prompt for one in engine._scheduler.running)


def test_long_prompts_behind_the_first_are_not_starved_by_short_ones() -> None:
    """A second long prompt waits for the first at most, since it is then the first in line itself."""
    engine = quiet()
    engine.add([EngineRequest(name, [5] * 1000, GREEDY, 2, 0) for name in ("first", "second")])
    numbers = iter(range(10**6))

    def feed(step: int) -> None:  # as many tokens as the second half holds, and more
        engine.add([EngineRequest(str(next(numbers)), [6] * 30, GREEDY, 1, 0)])

    half = BUDGET // 2 // PAGE_SIZE * PAGE_SIZE
    steps = wait_for(engine, feed, "second", 1000)
    assert steps <= 2 * -(-1000 // half) + 2


@pytest.mark.parametrize("seed", range(10))
def test_lower_priorities_first_and_equal_ones_in_order(seed: int) -> None:
    """With a seat for one, the order of answers is the order of priority, then of arrival."""
    rng = random.Random(seed)
    engine = quiet(max_num_seqs=1, enable_prefix_caching=seed % 2 == 0)
    added = [
        EngineRequest(str(number), [5] * rng.randint(1, 60), GREEDY, rng.randint(1, 3), 0, priority=rng.randint(-1, 1))
        for number in range(12)
    ]
    engine.add(added)
    ended = [one.request_id for one in drain(engine) if one.finish_reason]
    assert ended == [one.request_id for one in sorted(added, key=lambda one: (one.priority, int(one.request_id)))]


def test_a_prompt_of_lower_priority_number_is_read_before_those_under_way() -> None:
    engine = quiet()
    engine.add([EngineRequest("old", [5] * 2000, GREEDY, 1, 0, priority=1)])
    for _ in range(3):
        engine.step()
    engine.add([EngineRequest("new", [6] * 640, GREEDY, 1, 0, priority=0)])
    assert wait_for(engine, lambda step: None, "new", 100) <= 2 * -(-640 // BUDGET) + 2


def test_a_step_that_cannot_be_launched_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its plan had taken out of the books is there again: the engine comes to rest, and goes on with others."""
    info = engine_info(num_pages=6, num_host_pages=20, max_num_batched_tokens=32, eos_token_ids=())
    engine = Engine(info, Memory(info).execute)
    params = SamplingParams(temperature=0)
    start, calls = engine._runner.start, iter(range(1000))

    def fail_once(*arguments: Any) -> Any:
        if next(calls) == 6:
            raise OSError("the catalogue's disk is gone")
        return start(*arguments)

    monkeypatch.setattr(engine._runner, "start", fail_once)
    engine.add([EngineRequest("a", [5] * 100, params, 60, 0)])
    tokens: list[int] = []
    failures = 0
    while engine.has_work:
        try:
            tokens += [output.token_id for output in engine.step() if isinstance(output, TokenOutput)]
        except OSError:
            failures += 1
    assert failures == 1 and len(tokens) == 60
    engine.integrity_check()
    engine.close()


def test_nobody_waits_for_a_prefix_that_a_lower_priority_may_not_compute() -> None:
    info = engine_info(
        max_model_len=2000, max_num_batched_tokens=32, num_pages=200, eos_token_ids=(), enable_prefix_caching=True
    )
    engine = Engine(info, Memory(info).execute)
    params = SamplingParams(temperature=0)
    shared = [7] * 64
    engine.add([EngineRequest("first", [6] * 1600, params, 1, 0, priority=1)])
    engine.add([EngineRequest("low", [*shared, 8], params, 1, 0, priority=9)])
    engine.step()
    engine.add([EngineRequest("high", [*shared, 9], params, 1, 0, priority=-5)])
    steps = 0
    while "high" not in {output.request_id for output in engine.step()}:
        steps += 1
    assert steps <= 8
    drain(engine)


def test_of_requests_that_come_together_one_computes_what_they_share() -> None:
    info = engine_info(max_num_batched_tokens=32, num_pages=40, eos_token_ids=(), enable_prefix_caching=True)
    engine = Engine(info, Memory(info).execute)
    params = SamplingParams(temperature=0)
    engine.add([EngineRequest(str(number), [7] * 64 + [8 + number] * 8, params, 1, 0) for number in range(3)])
    cached = {output.request_id: sum(output.num_cached_tokens) for output in drain(engine)}
    assert cached == {"0": 0, "1": 64, "2": 64}
