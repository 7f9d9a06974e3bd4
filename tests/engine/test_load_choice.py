"""Which known pages are taken up, by figures that a test gives; and that an engine measures them and does as chosen."""

from pathlib import Path

import pytest
from support.history import GREEDY
from support.llms import PAGE_SIZE, idle_engine, tiered
from support.memory import engine_info
from support.prompts import random_prompt

from distkv import LLM, SamplingParams
from distkv.engine.load_choice import RETRY_PAGES, RETRY_SECONDS, LoadChoice
from distkv.engine.protocol import EngineRequest
from distkv.engine.sequence import Sequence
from distkv.engine.sequence_work import SequenceWork
from distkv.outputs import RequestOutput
from distkv.planner.model_shape import attention_cost, find_model
from distkv.planner.sizing import cold_page_seconds
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.meter import Measures
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import SequencePlan, StepPlan
from distkv.workers.rank import Rank
from distkv.workers.sizes import Bandwidth

DEVICE, HOST, DISK = Tier
PAGE_BYTES = 1000


class Engine:
    """A choice over a device that is empty, and what it is told."""

    def __init__(self, num_pages: int = 100, attention_cost: float = 0.0, num_ranks: int = 1):
        self.now = 0.0
        self.cache = TieredCache((num_pages, 100, 100), 1)
        info = engine_info(
            page_bytes=PAGE_BYTES, num_ranks=num_ranks, attention_cost=attention_cost, cold_page_seconds=(0.001, 0.01)
        )
        self.choice = LoadChoice(info, self.cache, lambda: self.now)

    def computed(self, tokens: int, seconds: float, start: int = 0) -> None:
        """A step that reads a prompt; the seconds are the sum over the ranks."""
        self.choice.note([work(start, tokens, first_page=1)], report(compute=seconds))

    def loaded(self, tier: Tier, pages: int, seconds: float, begins: bool = True) -> None:
        """A step that streams pages, of a sequence that begins with them or of one that has run before."""
        route = f"{tier.name.lower()}_streamed"
        told = report(**{route: seconds})
        told.bytes_moved = {route: pages * PAGE_BYTES}
        self.choice.note([work(pages * PAGE_SIZE, 1, first_page=0 if begins else pages, tier=tier)], told)

    def taken(self, *tiers: Tier, num_held: int = 0) -> int:
        """How many pages of a prompt that lie so are taken up."""
        found = [
            Page(
                number, references=number < num_held, full=True, slots=tuple(0 if one is tier else None for one in Tier)
            )
            for number, tier in enumerate(tiers)
        ]
        worth = self.choice.worth_taking(found)
        assert worth == found[: len(worth)]
        return len(worth)


def work(start: int, tokens: int, first_page: int, tier: Tier = DEVICE) -> SequenceWork:
    request = EngineRequest("0", [5], GREEDY, 1, 0)
    sequence = Sequence(request, 0, 0, PageTable(TieredCache((1, 0, 0), 1), PAGE_SIZE), [5], None)
    sequence.cached_tiers = [tier]
    return SequenceWork(sequence, tokens, SequencePlan(0, [5] * tokens, start, 1, 0, first_page))


def report(**seconds: float) -> Report:
    return Report(measures=Measures({kind: round(taken * 1e9) for kind, taken in seconds.items()}))


def test_all_is_loaded_until_figures_say_otherwise() -> None:
    engine = Engine()
    engine.loaded(DISK, 10, 100.0)
    assert engine.taken(DISK, DISK) == 2, "nobody knows how long computing takes"
    engine.computed(160, 1.6)  # 0.16 s for a page
    assert engine.taken(DISK, DISK) == 0
    engine = Engine()
    engine.computed(160, 1.6)
    assert engine.taken(DISK, HOST, DISK) == 3, "the start has measured 0.01 s"
    engine.loaded(DISK, 10, 100.0, begins=False)
    assert engine.taken(DISK, HOST, DISK) == 3, "what a sequence streams again may come from the page cache"
    for _ in range(3):
        engine.loaded(DISK, 10, 1.9)
    assert engine.taken(DISK, HOST, DISK) == 3, "0.17 s is not clearly slower than 0.16"


def test_what_is_near_is_taken_and_what_is_far_is_computed() -> None:
    engine = Engine()
    engine.loaded(DISK, 10, 10.0)  # half of it counts: 0.5 s for a page
    engine.computed(160, 1.6)
    assert engine.taken(DEVICE, HOST, DISK, DISK) == 2
    assert engine.taken(DISK, DISK, HOST, HOST, HOST) == 0
    assert engine.taken(DISK, DISK, *[HOST] * 4) == 6, "pages of the host cannot be had without those before them"
    assert engine.taken() == 0


def test_what_is_streamed_for_others_is_taken() -> None:
    engine = Engine()
    engine.computed(160, 1.6)
    engine.loaded(DISK, 10, 100.0)
    assert engine.taken(DISK, DISK, DISK, num_held=2) == 2


def test_later_pages_cost_more_to_compute() -> None:
    engine = Engine(num_pages=1000, attention_cost=1 / PAGE_SIZE)
    engine.computed(PAGE_SIZE, 0.16 * 1.53125)  # 0.16 s for a page that attends to nothing
    engine.loaded(DISK, 10, 21.0)  # 1.06 s for a page, as the fifth one takes to compute
    assert engine.taken(*[DISK] * 5) == 0
    assert engine.taken(*[DISK] * 20) == 20
    deep = Engine(num_pages=1000, attention_cost=1 / PAGE_SIZE)
    deep.computed(PAGE_SIZE, 0.16 * 101.53125, start=100 * PAGE_SIZE)
    deep.loaded(DISK, 10, 21.0)
    assert deep.taken(*[DISK] * 5) == 0 and deep.taken(*[DISK] * 20) == 20, "whatever depth was measured"


def test_seconds_of_ranks_that_work_side_by_side_count_once() -> None:
    engine = Engine(num_ranks=4)
    engine.computed(160, 4 * 1.6)
    engine.loaded(DISK, 10, 4 * 3.0)
    assert engine.taken(DISK) == 1, "0.155 s to load, and 0.16 s to compute"
    engine.loaded(DISK, 10, 4 * 5.0)
    assert engine.taken(DISK) == 0


def test_without_room_on_the_device_all_is_taken() -> None:
    engine = Engine(num_pages=3)
    engine.computed(160, 1.6)
    engine.loaded(DISK, 10, 10.0)
    assert engine.taken(*[DISK] * 3) == 0
    assert engine.taken(*[DISK] * 4) == 4


def test_a_few_pages_tell_whether_a_disk_is_fast_again() -> None:
    engine = Engine()
    engine.computed(160, 1.6)
    engine.loaded(DISK, 10, 10.0)
    engine.now = RETRY_SECONDS - 1
    assert engine.taken(*[DISK] * 20) == 0
    engine.now = RETRY_SECONDS
    assert engine.taken(*[DISK] * 20) == RETRY_PAGES
    engine.loaded(DISK, RETRY_PAGES, 4.0)
    assert engine.taken(*[DISK] * 20) == 0, "it is not"
    engine.now *= 2
    assert engine.taken(DISK, DISK) == 2
    for _ in range(3):
        engine.loaded(DISK, RETRY_PAGES, 0.01)
    assert engine.taken(*[DISK] * 20) == 20


def test_what_the_launch_tells() -> None:
    spec = PageSpec(num_layers=2, num_kv_heads=2, head_dim=16, page_size=16, dtype="float32")
    size = spec.page_bytes_in(HOST)
    rates = [Bandwidth(host=4.0 * size, disk=2.0 * size), Bandwidth(host=5.0 * size, disk=size)]
    assert cold_page_seconds([spec, spec], rates) == (0.25, 1.0), "the slowest rank's"
    assert cold_page_seconds([spec], [Bandwidth(host=size)]) == (1.0, 0.0)
    assert cold_page_seconds([spec], []) == (0.0, 0.0)
    # 30 layers of 9 heads of 64 and 106,168,320 weights of products
    assert attention_cost(find_model("smollm2-135m").config) == pytest.approx(2 * 9 * 64 * 30 / 106_168_320)


# --- a real engine ---

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
FIRST = random_prompt(170)
SECOND = FIRST[:165] + random_prompt(30, 2)
COMMON = 160


def ask(llm: LLM, prompt: list[int]) -> RequestOutput:
    [output] = llm.generate([prompt], PARAMS, use_tqdm=False)
    idle_engine(llm).integrity_check()
    return output


def test_pages_that_are_computed_again_have_the_same_bits_and_are_found_next(tiny_model: Path, tmp_path: Path) -> None:
    options = (tiny_model, (60, 40, 60), tmp_path)
    with tiered(*options, max_num_batched_tokens=256) as llm:
        ask(llm, FIRST)
        choice = idle_engine(llm)._scheduler.load_choice
        assert choice._token_seconds and choice._token_seconds > 0, "measured"
    with tiered(*options, max_num_batched_tokens=256) as llm:
        choice = idle_engine(llm)._scheduler.load_choice
        before = choice._load_seconds[DISK]
        loaded = ask(llm, SECOND)
        assert loaded.num_cached_tokens_by_tier == {"device": 0, "host": 0, "disk": COMMON}
        assert choice._load_seconds[DISK] != before, "measured"
        llm.reset_prefix_cache()
        ask(llm, FIRST)
    with tiered(*options, max_num_batched_tokens=256) as llm:
        choice = idle_engine(llm)._scheduler.load_choice
        choice._token_seconds, choice._load_seconds[DISK] = 1e-6, 1.0
        again = ask(llm, SECOND)
        assert again.num_cached_tokens == 0 and again.outputs == loaded.outputs
        assert ask(llm, FIRST).num_cached_tokens_by_tier == {"device": COMMON, "host": 0, "disk": 0}
        stats = llm.stats()
        assert stats.requests.prefix_recomputed == COMMON and stats.requests.prefix_hits["disk"] == 0
        assert "compute" not in stats.seconds_moved


def test_pages_are_fetched_behind_the_step_that_streams_them_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (tiny_model, (60, 40, 60), tmp_path)
    with tiered(*options) as llm:
        ask(llm, FIRST)
    plans: list[StepPlan] = []
    execute = Rank.execute
    monkeypatch.setattr(Rank, "execute", lambda rank, plan, *others: plans.append(plan) or execute(rank, plan, *others))
    with tiered(*options) as llm:
        assert ask(llm, SECOND).num_cached_tokens_by_tier["disk"] == COMMON
        assert llm.stats().bytes_moved["disk_to_host"]
    fetched = [any(one.target < one.source for one in plan.transfers) for plan in plans if plan.sequences]
    assert fetched[:2] == [False, True]
