"""Tokens are read one step late: the step after them is launched first, and refers to them. What comes of it is what
would have come of waiting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.llms import idle_engine
from support.memory import EOS, VOCAB, Memory, engine_info
from support.plans import sequence_step, step_plan
from support.prompts import random_prompts
from support.ranks import load_rank, rank_pages, scatter
from support.speaker import answers, make, requests, run, run_all, speak
from torch import Tensor

from distkv import LLM, DistKVError, SamplingParams
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, RequestFailed, TokenOutput
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.sampling.placeholders import resolve_placeholders
from distkv.workers.sampling.sample_row import SampleRow, uniform_number
from distkv.workers.sampling.sampled_token import SampledToken
from distkv.workers.sampling.sampler import SampledTokens, sample

SAMPLED = SamplingParams(temperature=1.0, ignore_eos=True)
PENALISED = SamplingParams(temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.3, ignore_eos=True)


# --- references ---


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.data())
def test_references_become_tokens(drawn: list[int], data: st.DataObject) -> None:
    references = st.integers(-len(drawn), -1)
    token_ids = data.draw(st.lists(references | st.integers(0, 99), max_size=12))
    wanted = [token if token >= 0 else drawn[-1 - token] for token in token_ids]
    assert resolve_placeholders(torch.tensor(token_ids, dtype=torch.int64), torch.tensor(drawn)).tolist() == wanted


def test_a_rank_runs_what_a_plan_refers_to(tiny_model: Path) -> None:
    """Bit for bit what it computes for the tokens themselves, some of which a plan may know."""
    prompts = random_prompts(20, 5, 33)
    slots = scatter(7, rank_pages(load_rank(tiny_model)))
    pages = [slots[:2], slots[2:4], slots[4:]]
    logits = []
    for newest, drawn in (([41, 17, 7], []), ([-3, 17, -2], [90, 7, 41, 7])):
        rank = load_rank(tiny_model)
        contexts = list(zip(prompts, pages, strict=True))
        rank.execute(step_plan([sequence_step(one, 0, own, len(one), 1) for one, own in contexts]))
        plan = step_plan(
            [
                sequence_step([token], len(one), own, len(one), 1)
                for token, (one, own) in zip(newest, contexts, strict=True)
            ]
        )
        plan.num_sampled = len(drawn)
        logits.append(rank.execute(plan, torch.tensor(drawn) if drawn else None))
    assert torch.equal(*logits)


def test_a_real_engine_refers_in_every_step_of_a_decode(tiny_model: Path) -> None:
    with LLM(tiny_model, device_kv_bytes="4MiB") as llm:
        engine = idle_engine(llm)
        execute, plans = engine._runner.executor.forward, []

        def spy(plan: StepPlan, drawn: Tensor | None) -> Any:
            plans.append(plan)
            return execute(plan, drawn)

        engine._runner.executor.forward = spy
        greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        llm.generate([[5] * 10, [6] * 7], greedy, use_tqdm=False)
    decodes = [plan for plan in plans if plan.sequences and plan.sequences[0].start >= 7]
    assert len(decodes) == 19
    for plan in decodes:
        assert plan.num_sampled == 2
        assert [part.token_ids for part in plan.sequences] == [[-1], [-2]]


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a GPU."""

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("backend, expected", [("gloo", torch.Tensor), ("nccl", Elsewhere)])
def test_gloo_gathers_in_cpu_memory(monkeypatch: pytest.MonkeyPatch, backend: str, expected: type) -> None:
    seen: list[type] = []

    def gather(mine: Tensor, parts: list[Tensor], **where: Any) -> None:
        seen.extend(type(one) for one in (mine, *parts))
        for number, part in enumerate(parts):
            part.copy_(mine + number)

    monkeypatch.setattr(dist, "gather", gather)
    group = ProcessGroup(backend=backend)
    group.size = 2
    columns = torch.arange(6.0).view(2, 3)
    gathered = group.gather_columns(columns.as_subclass(Elsewhere), [3, 2])
    assert gathered is not None
    assert torch.equal(gathered.as_subclass(torch.Tensor), torch.cat([columns, columns[:, :2] + 1], dim=1))
    assert seen == [expected] * 3


# --- reading late ---


class LateDraws:
    """Sampled tokens that are read when a test lets them."""

    def __init__(self, draws: SampledTokens, read: Callable[[], None]):
        self.tokens, self._draws, self._read = draws.tokens, draws, read

    def result(self) -> list[SampledToken]:
        self._read()
        return self._draws.result()


def read_by(patch: pytest.MonkeyPatch, read: Callable[[], None]) -> None:
    """Has `read` called whenever draws are about to be read."""

    def late(logits: Tensor, rows: list[SampleRow], drawn: Tensor | None) -> Any:
        return LateDraws(sample(logits, rows, drawn), read)

    patch.setattr("distkv.workers.group.rank_executor.sample", late)


@pytest.mark.parametrize("window", [40, 6], ids=["settled before", "settled when the step has landed"])
def test_the_next_step_runs_before_tokens_are_read(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Its ranks have done all of it when the tokens that it runs are still unread; and no step is begun before those of
    the step before the last are."""
    added = requests(4, SAMPLED, 40)
    expected, _ = run(added)
    engine, _ = make(num_pages=window, num_host_pages=0 if window == 40 else 100, max_num_batched_tokens=32)
    num_read = num_ahead = begun = 0
    execute = engine._runner.executor.forward

    def spy(plan: StepPlan, drawn: Tensor | None) -> Any:
        nonlocal begun
        if any(part.num_logits for part in plan.sequences):
            begun += 1
            assert begun <= num_read + 2, "two steps are under way at most"
        return execute(plan, drawn)

    def read() -> None:
        nonlocal num_read, num_ahead
        following = engine._running
        if following is not None:
            assert following.wait().error is None
            num_ahead += bool(following.plan.num_sampled)
        num_read += 1

    engine._runner.executor.forward = spy
    read_by(monkeypatch, read)
    found, outputs = run_all(engine, added)
    assert found == expected
    assert not [one for one in outputs if isinstance(one, RequestFailed)]
    assert num_read == begun
    assert num_ahead >= 30
    engine.integrity_check()


@pytest.mark.parametrize("params", [PENALISED, SamplingParams(temperature=0.7, presence_penalty=1.0)])
def test_a_draw_knows_the_token_that_is_late(params: SamplingParams) -> None:
    """Penalties count it, and so does the place of the draw: answers are those of drawing token after token, with all
    before it known."""
    added = requests(5, params, 40)
    found, _ = run(added)
    for request in added:
        answer = found[request.request_id, 0]
        for place, token in enumerate(answer):
            row = SampleRow(
                0, params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty,
                params.presence_penalty, params.frequency_penalty, None, uniform_number(request.seed, 0, place),
                request.prompt_token_ids, answer[:place],
            )  # fmt: skip
            logits = speak([*request.prompt_token_ids, *answer[:place]])[None]
            assert sample(logits, [row]).result() == [(token, None)]
    if not params.ignore_eos:
        assert any(answer[-1] == EOS for answer in found.values())


# --- failures ---


def short_requests(params: SamplingParams, max_tokens: int) -> list[EngineRequest]:
    """Three that are read in one step, so that step `n` draws the answers' tokens of number `n`."""
    return [EngineRequest(str(number), [5 + number] * 7, params, max_tokens, seed=number) for number in range(3)]


def fail_at(wanted: int, error: BaseException) -> Callable[[], None]:
    calls = iter(range(10**6))

    def read() -> None:
        if next(calls) == wanted:
            raise error

    return read


@pytest.mark.parametrize("wanted", [0, 1, 5, 29])
def test_a_device_that_fails_ends_the_engine(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    """It shows when tokens are read, with the next step launched, or none behind the last one: nothing is told after
    that, whoever asks again, and all is closed."""
    added = short_requests(SAMPLED, 30)
    expected, _ = run(added)
    engine, memory = make()
    closed: list[bool] = []
    engine._close = lambda: closed.append(True)
    read_by(monkeypatch, fail_at(wanted, RuntimeError("an illegal memory access")))
    engine.add(added)
    outputs: list[Any] = []
    with pytest.raises(DistKVError, match=r"device failed.*illegal memory access.*make a new LLM"):
        while True:
            outputs += engine.step()
    assert (engine._running is None) == (wanted == 29)
    found = answers(outputs)
    assert all(tokens == expected[key][: len(tokens)] for key, tokens in found.items())
    assert sum(map(len, found.values())) == sum(isinstance(one, TokenOutput) for one in outputs)
    assert max(map(len, found.values()), default=0) == wanted
    steps = memory.num_steps
    for _ in range(3):
        with pytest.raises(DistKVError, match="device failed"):
            engine.step()
    engine._runner.drain = lambda: pytest.fail("what such a device computed is not saved")  # type: ignore[method-assign]
    engine.close()
    assert closed == [True]
    assert memory.num_steps <= steps + 1, "the one that was launched"


def test_a_device_that_fails_breaks_all_requests_of_an_llm(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm = LLM(tiny_model, device_kv_bytes="4MiB")
    bystander = llm.stream([7, 8], greedy)
    next(bystander)
    read_by(monkeypatch, fail_at(9, RuntimeError("out of luck")))
    with pytest.raises(DistKVError, match="out of luck"):
        llm.generate([[5] * 10, [6] * 7], greedy, use_tqdm=False)
    with pytest.raises(DistKVError, match="out of luck"):
        for _ in bystander:
            pass
    with pytest.raises(DistKVError, match="out of luck"):
        llm.generate([[5]], greedy, use_tqdm=False)
    llm.close()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("aborts", [False, True])
def test_a_wait_that_is_interrupted_is_taken_up_again(monkeypatch: pytest.MonkeyPatch, n: int, aborts: bool) -> None:
    """At any step, with the next one launched: the tokens are told by the next call, unless their answer has ended."""
    added = short_requests(SamplingParams(n=n, temperature=1.0, ignore_eos=True), 12)
    expected, _ = run(added)
    for wanted in range(14):
        engine, _ = make()
        with monkeypatch.context() as patch:
            read_by(patch, fail_at(wanted, KeyboardInterrupt()))
            engine.add(added)
            outputs: list[Any] = []
            interrupted = 0
            while engine.has_work:
                try:
                    outputs += engine.step()
                except KeyboardInterrupt:
                    interrupted += 1
                    if aborts:
                        engine.abort([("1", None)])
        assert interrupted == (wanted < 12)
        found = answers(outputs)
        if aborts:
            for index in range(n):
                told = found.pop(("1", index), [])
                assert told == expected["1", index][: len(told)]
        assert found == {key: tokens for key, tokens in expected.items() if key in found}
        assert len(found) >= len(expected) - n * aborts
        engine.integrity_check()
        engine.close()


def test_an_engine_is_closed_with_tokens_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make()
    read_by(monkeypatch, fail_at(5, KeyboardInterrupt()))
    engine.add(short_requests(SAMPLED, 12))
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.step()
    assert engine._unread is not None and engine._running is not None
    engine.close()
    assert engine._unread is None and engine._running is None
    assert engine.stats().pages_in_use == 0


def test_drawing_that_fails_on_the_host_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the step behind it is settled, and before it is launched: both are taken back and run again, one sequence
    at a time, and no answer changes."""
    added = short_requests(PENALISED, 20)
    expected, _ = run(added)
    for wanted in (0, 1, 7, 19):
        calls = iter(range(10**6))

        def fail_once(
            logits: Tensor, rows: list[SampleRow], drawn: Tensor | None, wanted=wanted, calls=calls
        ) -> SampledTokens:
            if next(calls) == wanted:
                raise MemoryError("no room for parameters")
            return sample(logits, rows, drawn)

        engine, _ = make()
        with monkeypatch.context() as patch:
            patch.setattr("distkv.workers.group.rank_executor.sample", fail_once)
            found, outputs = run_all(engine, added)
        assert not [one for one in outputs if isinstance(one, RequestFailed)]
        assert found == expected
        engine.integrity_check()


def test_a_launch_that_fails_loses_no_token_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    added = short_requests(PENALISED, 12)
    expected, _ = run(added)
    for wanted in range(12):
        engine, _ = make()
        start, calls = engine._runner.start, iter(range(10**6))

        def fail_once(*arguments: Any, start=start, calls=calls, wanted=wanted) -> Any:
            if next(calls) == wanted:
                raise OSError("the catalogue's disk is gone")
            return start(*arguments)

        engine._runner.start = fail_once  # type: ignore[method-assign]
        engine.add(added)
        outputs: list[Any] = []
        failures = 0
        while engine.has_work:
            try:
                outputs += engine.step()
            except OSError:
                failures += 1
        assert failures == 1
        assert answers(outputs) == expected
        engine.integrity_check()


def test_no_answer_is_run_past_its_limit() -> None:
    """Whatever is late: as many tokens are run as an answer may have, but for the last, which nobody reads."""
    for limit in (1, 2, 3, 17):
        info = engine_info(eos_token_ids=(), enable_prefix_caching=True)
        memory = Memory(info)
        engine = Engine(info, RankExecutor(memory.execute), survives=False)
        execute, ran = engine._runner.executor.forward, []

        def spy(plan: StepPlan, drawn: Tensor | None, execute=execute, ran=ran) -> Any:
            ran.extend(part.start + len(part.token_ids) for part in plan.sequences)
            return execute(plan, drawn)

        engine._runner.executor.forward = spy
        found, _ = run_all(engine, [EngineRequest("0", list(range(3, 24)), SAMPLED, limit, 0)])
        assert len(found["0", 0]) == limit and max(found["0", 0]) < VOCAB
        assert ran == list(range(21, 21 + limit))


def test_a_name_takes_the_tokens_themselves() -> None:
    """A page gets its name when its step has landed: by then its own tokens are known, and asking earlier is an
    error."""
    engine, _ = make()
    engine.add([EngineRequest("0", [5] * 20, SAMPLED, 40, 0)])
    for _ in range(14):
        engine.step()
    [sequence] = engine._scheduler.running
    assert sequence.num_pending == 1 and engine._running is not None
    assert len(sequence.token_ids) == sequence.table.num_tokens, "the step under way draws the token after them"
    with pytest.raises(AssertionError, match="the tokens themselves"):
        sequence.page_keys(len(sequence.token_ids) + 1)
    engine.close()
