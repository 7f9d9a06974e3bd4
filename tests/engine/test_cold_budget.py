"""What a long decode over cold pages moves: no more than with a fixed set of pages on the device, under a limit no more
than that, and each sequence gets its turn."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from support.history import GREEDY, History, caching_engine
from support.memory import PAGE_SIZE, engine_info
from torch import Tensor

from distkv.engine.cold_budget import DOUBT_STEPS, REVIEW_STEPS, TURN_STEPS
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.storage.tier import Tier, Transfer, decode_location
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import SequenceStep


@dataclass(frozen=True)
class Step:
    """What a step ran and moved, in pages."""

    tables: list[int]
    cold: list[set[int]]  # places below the device, by sequence
    transfers: list[Transfer]
    disk_cost: float

    @property
    def streamed(self) -> set[int]:
        """A page that several sequences share is brought once."""
        return set().union(*self.cold)

    @property
    def num_moved(self) -> int:
        return len(self.streamed) + len(self.transfers)

    def cost(self, places: set[int]) -> float:
        return sum(self.disk_cost if decode_location(place)[0] is Tier.DISK else 1.0 for place in places)


class Counting(History):
    """Writes down what each step streams and moves; content is looked at now and then, since that takes long."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.steps: list[Step] = []
        self.cold: list[set[int]] = []

    def execute(self, plan: StepPlan, drawn: Tensor | None) -> tuple[Tensor | None, Report]:
        self.cold = []
        tables = [part.table for part in plan.sequences]
        result = super().execute(plan, drawn)
        if tables:
            self.steps.append(Step(tables, self.cold, plan.transfers, self.info.disk_cost))
        return result

    def tokens_of(self, one: SequenceStep) -> list[int | None]:
        self.cold.append({place for place in one.pages.tolist() if place < 0})
        return super().tokens_of(one) if len(self.steps) % 23 == 0 else []


def decode(
    num_sequences: int, pages: int, window: int, limit: int, steps: int, *, host: int = 2000, **options: Any
) -> tuple[Engine, list[Step]]:
    """Sequences of `pages` full pages each, all read, that decode for so many steps; the steps of the decode."""
    info = engine_info(
        eos_token_ids=(), num_pages=window, num_host_pages=host, max_num_batched_tokens=PAGE_SIZE, page_bytes=1000,
        max_model_len=10**5, max_cold_bytes_per_step=1000 * limit, max_num_seqs=num_sequences, **options,
    )  # fmt: skip
    memory = Counting(info)
    engine = Engine(info, RankExecutor(memory.execute), survives=False)
    memory.watch(engine)
    rng = random.Random(0)
    engine.add(
        [
            EngineRequest(str(number), [rng.randrange(50) for _ in range(pages * PAGE_SIZE)], GREEDY, steps + 200, 0)
            for number in range(num_sequences)
        ]
    )
    while engine._scheduler.waiting or any(one.is_prefilling for one in engine._scheduler.running):
        engine.step()
    memory.steps.clear()
    while len(memory.steps) < steps:
        engine.step()
    engine._cache.integrity_check()
    return engine, memory.steps[:steps]


SHAPES = [(2, 24), (8, 8)]
"""Number of sequences, and pages of each."""


@pytest.mark.parametrize("num_sequences, pages", SHAPES)
@pytest.mark.parametrize("share", [0, 0.6, 0.2])
def test_no_more_moves_than_with_a_fixed_set(num_sequences: int, pages: int, share: float) -> None:
    """All sequences stream all that the window, half of them all, does not hold. `share` of that is the limit; 0 for
    none. Nothing goes up and down again and again."""
    window, steps = num_sequences * pages // 2, 300
    limit = int(share * window)
    _, decoded = decode(num_sequences, pages, window, limit, steps)
    drawn = sum(len(step.tables) for step in decoded)
    held = num_sequences * (pages + 0.5) + drawn / 2 / PAGE_SIZE  # on average, with those being filled
    optimum = (held - window) * steps / drawn
    assert sum(step.num_moved for step in decoded) / drawn <= 1.2 * optimum
    if not limit:
        assert {len(step.tables) for step in decoded} == {num_sequences}, "nobody waits without a limit"
    ups = Counter(
        one.source_slot for step in decoded for one in step.transfers if one.target is Tier.DEVICE
    )  # a host slot keeps its page
    assert max(ups.values(), default=0) <= (steps / TURN_STEPS + 1 if limit else 1)


@pytest.mark.parametrize("num_sequences, pages", SHAPES)
@pytest.mark.parametrize("share", [0.6, 0.2, 0.01])
def test_the_limit_is_kept_and_everyone_gets_a_turn(num_sequences: int, pages: int, share: float) -> None:
    """The first in line runs whatever it streams. Between two reviews each running sequence may fill a page, for which
    another becomes cold."""
    window = num_sequences * pages // 2
    limit = max(1, int(share * window))
    steps = min(1000, num_sequences * (TURN_STEPS + REVIEW_STEPS))
    engine, decoded = decode(num_sequences, pages, window, limit, steps)
    last: Counter[int] = Counter()
    for number, step in enumerate(decoded):
        assert step.tables, "the first in line always runs"
        if len(step.tables) > 1 and number >= REVIEW_STEPS:  # reading prompts made more pages cold at a time
            alone = max(step.cost(cold) for cold in step.cold)
            assert step.cost(step.streamed) <= max(limit, alone) + len(step.tables), number
        for table in step.tables:
            assert number - last[table] <= (num_sequences - 1) * (TURN_STEPS + REVIEW_STEPS)
            last[table] = number
    assert len(last) >= min(num_sequences, steps // (TURN_STEPS + REVIEW_STEPS))
    for sequence in engine._scheduler.running:
        assert steps - last[sequence.number] <= (num_sequences - 1) * (TURN_STEPS + REVIEW_STEPS)
    assert any(one.is_parked for one in engine._scheduler.running) or share == 0.6


def test_pages_on_disk_cost_more() -> None:
    """The limit is exceeded by no more than what has moved down since the review before the last."""
    _, decoded = decode(4, 8, 16, 24, 300, host=8, num_disk_pages=500, disk_cost=3.0)
    assert any(decode_location(place)[0] is Tier.DISK for step in decoded for place in step.streamed)
    for number, step in enumerate(decoded):
        if len(step.tables) == 1 or number < 2 * REVIEW_STEPS:
            continue
        alone = max(step.cost(cold) for cold in step.cold)
        lately = [one.target for before in decoded[number - 2 * REVIEW_STEPS : number] for one in before.transfers]
        slack = lately.count(Tier.HOST) + 2 * lately.count(Tier.DISK)
        assert step.cost(step.streamed) <= min(2 * 24, max(24, alone) + slack)
    assert any(len(step.tables) > 1 for step in decoded)


def test_the_limit_is_kept_while_a_prompt_is_read() -> None:
    """Each step makes as many pages cold as its chunk fills, until the next review."""
    limit, chunk = 10, 4
    info = engine_info(
        eos_token_ids=(), num_pages=48, num_host_pages=2000, max_num_batched_tokens=chunk * PAGE_SIZE + 2,
        page_bytes=1000, max_model_len=10**5, max_cold_bytes_per_step=1000 * limit,
    )  # fmt: skip
    memory = Counting(info)
    engine = Engine(info, RankExecutor(memory.execute), survives=False)
    memory.watch(engine)
    engine.add([EngineRequest(str(number), [5 + number] * 16 * PAGE_SIZE, GREEDY, 400, 0) for number in range(2)])
    while len(memory.steps) < 60:
        engine.step()
    engine.add([EngineRequest("long", [9] * 100 * PAGE_SIZE, GREEDY, 5, 0)])
    while len(memory.steps) < 120:
        engine.step()
    assert {len(step.tables) for step in memory.steps[60:]} >= {1, 3}
    for step in memory.steps[60:]:
        alone = max(step.cost(cold) for cold in step.cold)
        assert len(step.tables) == 1 or step.cost(step.streamed) <= max(limit, alone) + DOUBT_STEPS * chunk + len(
            step.tables
        )


def test_parked_sequences_resume_and_finish() -> None:
    """What each reads is its own history, which `History` looks at in each step; the one that came first is never
    parked before its turn is over."""
    engine, _ = caching_engine(
        num_pages=14, num_host_pages=200, max_num_batched_tokens=16, page_bytes=1000, max_cold_bytes_per_step=3000,
        max_model_len=1000,
    )  # fmt: skip
    lengths = {"0": 130, "1": 90, "2": 140, "3": 30}
    engine.add(
        [
            EngineRequest(name, [5 + int(name)] * 100, GREEDY, max_tokens, 0, priority=int(name == "3"))
            for name, max_tokens in lengths.items()
        ]
    )
    was_parked: set[int] = set()
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, TokenOutput), output
            found.setdefault(output.request_id, []).append(output.token_id)
        parked = {one.number for one in engine._scheduler.running if one.is_parked}
        was_parked |= parked
        if any(not one.is_parked for one in engine._scheduler.running):
            assert 0 not in parked or len(found["0"]) > TURN_STEPS
        assert engine.stats().num_parked == len(parked)
    assert {name: len(tokens) for name, tokens in found.items()} == lengths
    assert {1, 2} & was_parked
    engine.integrity_check()
