"""Requests from event loops and threads, and how each of them may end."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from support.llms import idle_engine
from support.prompts import random_prompts

import distkv.frontend.front_end
from distkv import (
    LLM,
    AsyncLLM,
    CapacityError,
    DistKVError,
    EngineConfig,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    WorkerDied,
)
from distkv.async_llm import _Mailbox
from distkv.config import EngineOptions
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed, StepOutput, TokenOutput
from distkv.engine.stats import EngineStats
from distkv.frontend.front_end import FrontEnd
from distkv.frontend.session import Session
from distkv.outputs import join_deltas

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
FORKED = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, n=2)
LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 16, "device_kv_bytes": "4MiB"}


def of_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    return msgspec.structs.replace(params, output_kind=kind)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **OPTIONS) as llm:
        yield llm
        idle_engine(llm).integrity_check()


def with_async(folder: Path, test: Callable[[AsyncLLM], Awaitable[None]], **options: Any) -> None:
    """Runs a test in an event loop, and sees to it that all pages are free again after it."""

    async def main() -> None:
        async with await AsyncLLM.create(folder, **(OPTIONS | options)) as llm:
            await asyncio.wait_for(test(llm), 60)
            await await_idle(llm)

    asyncio.run(main())


async def await_idle(llm: AsyncLLM) -> None:
    async with asyncio.timeout(60):
        while (stats := await llm.stats()).num_running or stats.num_waiting or stats.pages_in_use:
            await asyncio.sleep(0.001)


async def last_tokens(llm: AsyncLLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    async for output in llm.generate(prompt, params):
        last = output
    assert last.finished
    return last.outputs[0].token_ids


def test_many_concurrent_requests_have_the_answers_of_generate(tiny_model: Path, llm: LLM) -> None:
    prompts = random_prompts(*range(3, 43))
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    async def test(asynchronous: AsyncLLM) -> None:
        assert asynchronous.info == llm.info
        assert await asyncio.gather(*(last_tokens(asynchronous, prompt) for prompt in prompts)) == expected
        assert (await asynchronous.stats()).peak_pages_in_use > 16  # they did run together

    with_async(tiny_model, test)


def test_create_makes_a_subclass_with_an_init_of_its_own(tiny_model: Path) -> None:
    class Mine(AsyncLLM):
        def __init__(self, model: Path, **options: Any):
            super().__init__(model, **options)
            self.name = "mine"

    async def main() -> None:
        async with await Mine.create(tiny_model) as llm:
            assert llm.name == "mine" and await last_tokens(llm, [5])

    asyncio.run(main())


def test_outputs_grow(tiny_model: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        lengths, seconds = [], set()
        async for output in llm.generate([5, 6], SamplingParams(max_tokens=20, ignore_eos=True, n=2)):
            lengths.append([len(answer.token_ids) for answer in output.outputs])
            seconds.add(output.outputs[1].finish_reason)
            assert output.finished == (lengths[-1] == [20, 20])
            assert output.num_cached_tokens == 0 and set(output.num_cached_tokens_by_tier) == {"device", "host", "disk"}
        assert lengths == sorted(lengths) and len(lengths) > 3 and output.finished
        assert seconds == {None, "length"}

    with_async(tiny_model, test)


def test_a_slow_reader_gets_the_whole_text_in_fewer_outputs(tiny_model: Path, llm: LLM) -> None:
    expected = llm.generate([[9, 10]], GREEDY, use_tqdm=False)[0].outputs

    async def test(llm: AsyncLLM) -> None:
        outputs = []
        async for output in llm.generate([9, 10], GREEDY):
            outputs.append(output)
            if len(outputs) == 1:
                while (await llm.stats()).num_running:
                    await asyncio.sleep(0.001)
        assert len(outputs) < 40 and outputs[-1].outputs == expected

    with_async(tiny_model, test)


def test_deltas_merge_for_a_slow_reader(tiny_model: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=200, n=3, logprobs=1, ignore_eos=True)
    expected = llm.generate([[9, 10]], params, use_tqdm=False)[0].outputs

    async def test(llm: AsyncLLM) -> None:
        deltas: list[RequestOutput] = []
        async for output in llm.generate([9, 10], of_kind(params, RequestOutputKind.DELTA)):
            deltas.append(output)
            if len(deltas) in (1, 5):
                before = (await llm.stats()).num_running
                await asyncio.sleep(0.01)
            if len(deltas) == 5:
                while (await llm.stats()).num_running:
                    await asyncio.sleep(0.001)
        assert before and 5 < len(deltas) < 200
        assert max(len(one.token_ids) for one in deltas[-1].outputs) > 1
        assert join_deltas(deltas).outputs == expected

    with_async(tiny_model, test)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_every_reader_of_a_loop_gets_the_kind_it_asks_for(tiny_model: Path, llm: LLM, kind: RequestOutputKind) -> None:
    prompts = random_prompts(*range(3, 13))
    expected = llm.generate(prompts, FORKED, use_tqdm=False)

    async def test(llm: AsyncLLM) -> None:
        async def read(prompt: list[int]) -> list[RequestOutput]:
            return [output async for output in llm.generate(prompt, of_kind(FORKED, kind))]

        for outputs, whole in zip(await asyncio.gather(*map(read, prompts)), expected, strict=True):
            last = join_deltas(outputs) if kind is RequestOutputKind.DELTA else outputs[-1]
            assert last.finished and last.outputs == whole.outputs
            assert (len(outputs) == 1) == (kind is RequestOutputKind.FINAL_ONLY)

    with_async(tiny_model, test)


def test_a_cancelled_task_ends_its_request_and_no_other(tiny_model: Path, llm: LLM) -> None:
    expected = llm.generate([[7, 8]], LONG, use_tqdm=False)[0].outputs[0].token_ids

    async def test(llm: AsyncLLM) -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in llm.generate([5] * 20, LONG):
                begun.set()

        other = asyncio.create_task(last_tokens(llm, [7, 8], LONG))
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await llm.stats()).num_running == 1
        assert await other == expected

    with_async(tiny_model, test)


def test_a_task_that_is_cancelled_while_it_asks_leaves_nothing(tiny_model: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        for turns in range(12):
            task = asyncio.create_task(last_tokens(llm, [5, 6], LONG))
            for _ in range(turns):
                await asyncio.sleep(0 if turns < 6 else 0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not llm._mailbox_of_loop().groups
            await await_idle(llm)

    with_async(tiny_model, test)


def test_leaving_the_loop_ends_the_request(tiny_model: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        async for _ in llm.generate([5, 6], LONG):
            break
        await await_idle(llm)
        named = llm.generate([5, 6], LONG)
        async with aclosing(named):
            await anext(named)
        assert not (await llm.stats()).num_running, "closing it ends the request at once"
        with pytest.raises(StopAsyncIteration):
            await anext(named)

    with_async(tiny_model, test)


def test_an_exception_in_one_reader_does_not_touch_the_others(tiny_model: Path, llm: LLM) -> None:
    prompts = random_prompts(*range(3, 11))
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    async def test(llm: AsyncLLM) -> None:
        async def stumble() -> None:
            async for output in llm.generate([9] * 30, LONG):
                if len(output.outputs[0].token_ids) >= 3:
                    raise ZeroDivisionError

        results = await asyncio.gather(
            stumble(), *(last_tokens(llm, prompt) for prompt in prompts), return_exceptions=True
        )
        assert isinstance(results[0], ZeroDivisionError)
        assert results[1:] == expected

    with_async(tiny_model, test)


def test_a_refused_request_says_why_and_the_others_go_on(tiny_model: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        running = asyncio.create_task(last_tokens(llm, [5, 6], LONG))
        with pytest.raises(CapacityError, match="KV pages"):
            await last_tokens(llm, [5] * 200, SamplingParams(n=16, max_tokens=50))
        with pytest.raises(CapacityError, match="n is 1000000000 and max_num_seqs 16; lower n or raise max_num_seqs"):
            await last_tokens(llm, [5], SamplingParams(n=10**9))
        with pytest.raises(RequestError, match="token id 128"):
            await last_tokens(llm, [128])
        assert len(await running) == 254

    with_async(tiny_model, test, device_kv_bytes="256KiB", host_kv_bytes=0)


def test_one_object_serves_several_event_loops(tiny_model: Path) -> None:
    """One after the other, and two at a time."""
    llm = AsyncLLM(tiny_model, **OPTIONS)
    expected = asyncio.run(last_tokens(llm, [5, 6, 7]))
    found: list[list[int]] = []

    def run() -> None:
        async def several() -> None:
            found.extend([await last_tokens(llm, [5, 6, 7]) for _ in range(5)])

        asyncio.run(several())

    run_threads([run] * 3)
    assert found == [expected] * 15
    asyncio.run(llm.close())


def test_a_loop_that_is_gone_ends_its_requests(tiny_model: Path) -> None:
    llm = AsyncLLM(tiny_model, **OPTIONS)
    loop = asyncio.new_event_loop()
    outputs = llm.generate([5, 6], LONG)
    loop.run_until_complete(anext(outputs))
    loop.close()
    asyncio.run(await_idle(llm))
    asyncio.run(llm.close())
    del outputs


def test_the_tokenizer_is_there_and_chat_answers(demo_model: Path) -> None:
    async def main() -> None:
        async with await AsyncLLM.create(demo_model, dtype="float32", device_kv_bytes="64MiB") as llm:
            question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
            output = [one async for one in llm.chat(question, SamplingParams(temperature=0, max_tokens=40))][-1]
            assert output.outputs[0].text == "The capital of France is Paris."
            stopped = SamplingParams(temperature=0, max_tokens=40, stop=[" "])
            *earlier, output = [one async for one in llm.generate("Paris is", stopped)]
            assert not any(one.finished for one in earlier), "a token behind the stop string brings nothing"
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", " ")
            assert output.prompt == "Paris is" and output.prompt_token_ids == llm.tokenizer.encode("Paris is")
            await await_idle(llm)

    asyncio.run(main())


def test_a_task_that_is_cancelled_while_it_opens_a_session_does_not_keep_it(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the event loop stand still in the meantime."""
    open_session, begun, cancelled = FrontEnd.session, threading.Event(), threading.Event()
    opened: list[Session] = []

    def open_slowly(self: FrontEnd, *arguments: Any) -> Session:
        begun.set()
        assert cancelled.wait(60)
        opened.append(open_session(self, *arguments))
        return opened[-1]

    async def main() -> None:
        sizes = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "64MiB")
        async with await AsyncLLM.create(demo_model, cache_dir=tmp_path, max_num_batched_tokens=256, **sizes) as llm:

            async def ask() -> int:
                messages = [{"role": "user", "content": "Hello"}]
                return len([one async for one in llm.chat(messages, SamplingParams(max_tokens=2), session="trip")])

            task = asyncio.ensure_future(ask())
            await asyncio.to_thread(begun.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled.set()
            async with asyncio.timeout(60):
                while not opened or opened[0]._lock.is_held:
                    await asyncio.sleep(0.001)
            assert await ask()

    monkeypatch.setattr(FrontEnd, "session", open_slowly)
    asyncio.run(main())


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
def test_a_session_keeps_what_was_sampled_of_an_answer(
    demo_model: Path, tmp_path: Path, kind: RequestOutputKind
) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, output_kind=kind)

    answers: list[str] = []

    async def main() -> None:
        sizes = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "256MiB")
        async with await AsyncLLM.create(demo_model, cache_dir=tmp_path, max_num_batched_tokens=512, **sizes) as llm:

            async def ask(text: str, most: int) -> list[int]:
                """Leaves the answer after so many outputs; returns prompt and tokens."""
                yielded = []
                async with aclosing(llm.chat([{"role": "user", "content": text}], params, session="trip")) as outputs:
                    async for output in outputs:
                        yielded.append(output)
                        if len(yielded) == most:
                            break
                last = join_deltas(yielded) if kind is RequestOutputKind.DELTA else yielded[-1]
                answers.append(last.outputs[0].text)
                return [*last.prompt_token_ids, *last.outputs[0].token_ids]

            left = await ask("Write a long story about a library.", 3)
            whole = await ask("What is the capital of France? Answer in one sentence.", 1000)
            assert whole[: len(left)] == left
            with pytest.raises(RequestError, match="max_model_len"):
                await ask("word " * 9000, 1000)
            waiting = asyncio.ensure_future(ask("Tell me more.", 1000))
            await asyncio.sleep(0)
            waiting.cancel()  # before anything was sampled
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await ask("Thanks!", 1000))[: len(whole)] == whole
            with pytest.raises(RequestError, match="n is 2"):
                async for _ in llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(n=2), session="trip"):
                    pass

    asyncio.run(main())
    with Session(tmp_path, "trip") as session:
        questions = [message["content"] for message in session.messages[::2]]
        assert [message["content"] for message in session.messages[1::2]] == answers
    assert [question.split()[0] for question in questions] == ["Write", "What", "Thanks!"]


@pytest.mark.parametrize("found", ["other None", "own own other"])
def test_each_loop_has_a_mailbox_of_its_own(found: str) -> None:
    """Though that of another thread's takes its place at any moment."""

    class Replaced(AsyncLLM):
        @property
        def _mailbox(self) -> Any:
            return boxes[left.pop()] if left else other

        @_mailbox.setter
        def _mailbox(self, box: Any) -> None: ...

    async def main() -> None:
        boxes["own"] = _Mailbox(asyncio.get_running_loop())
        assert Replaced.__new__(Replaced)._mailbox_of_loop().loop is asyncio.get_running_loop()

    loop = asyncio.new_event_loop()
    other = _Mailbox(loop)
    boxes, left = {"None": None, "other": other}, found.split()[::-1]
    asyncio.run(main())
    loop.close()


def run_threads(functions: list[Callable[[], None]]) -> None:
    """Runs functions at a time; the first exception is raised here."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]


def test_an_llm_serves_several_threads(llm: LLM) -> None:
    prompts = random_prompts(*range(10, 26))
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    def generate() -> None:
        outputs = llm.generate(prompts[:8], GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected[:8]

    def stream(number: int) -> None:
        *_, last = llm.stream(prompts[number], GREEDY)
        assert last.outputs[0].token_ids == expected[number]
        assert llm.stats().peak_pages_in_use

    run_threads([generate, generate, *(lambda number=number: stream(number) for number in range(8, 16))])


def test_an_llm_works_within_a_running_event_loop(llm: LLM) -> None:
    async def cell() -> None:
        assert llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0].finished
        *_, last = llm.stream([5, 6], GREEDY)
        assert last.finished and llm.stats()

    asyncio.run(cell())


def test_priority_and_salt_reach_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, added = idle_engine(llm), []
    add = engine.add

    def spy(requests: list[EngineRequest]) -> None:
        added.extend((request.priority, request.cache_salt) for request in requests)
        add(requests)

    monkeypatch.setattr(engine, "add", spy)
    short = SamplingParams(max_tokens=2)
    llm.generate([[5], [6]], short, priority=[3, -1], cache_salt=["a", None], use_tqdm=False)
    llm.generate([[5], [6]], short, priority=7, cache_salt="b", use_tqdm=False)
    list(llm.stream([5], short, priority=2, cache_salt="c"))
    list(llm.stream([5], short))
    llm.generate({"prompt_token_ids": [5], "cache_salt": "d", "images": None}, short, use_tqdm=False)  # type: ignore[typeddict-unknown-key]
    list(llm.stream({"prompt_token_ids": [5], "cache_salt": "e"}, short, cache_salt="e"))
    idle_engine(llm)
    assert added == [(3, "a"), (-1, None), (7, "b"), (7, "b"), (2, "c"), (0, None), (0, "d"), (0, "e")]
    for own, message in (("f", "cache_salt is 'g', and 'f' in the prompt; give one"), (5, "cache_salt is 5; it must")):
        with pytest.raises(RequestError, match=message):
            llm.stream({"prompt_token_ids": [5], "cache_salt": own}, short, cache_salt="g")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"priority": "high"}, "priority is 'high'; it must be an integer"),
        ({"priority": True}, "priority is True"),
        ({"priority": 1.5}, "priority is 1.5"),
        ({"priority": 2**63}, "64 bits"),
        ({"priority": [1, 2]}, "1 prompts came with 2 priority"),
        ({"cache_salt": 5}, "cache_salt is 5; it must be a text"),
        ({"cache_salt": "a\udcff"}, "cache_salt"),
        ({"cache_salt": [None, "a"]}, "1 prompts came with 2 cache_salt"),
    ],
)
def test_bad_priorities_and_salts_name_the_cure(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([[5]], use_tqdm=False, **options)
    if not isinstance(next(iter(options.values())), list):
        with pytest.raises(RequestError, match=message):
            llm.stream([5], **options)


def test_options_are_the_fields_of_the_config() -> None:
    fields = {name: kind for name, kind in get_type_hints(EngineConfig).items() if name != "model"}
    assert get_type_hints(EngineOptions) == fields


class FakeEngine:
    """Samples token 7 for every open answer in each step; `before_step` may sleep or raise."""

    def __init__(self, before_step: Callable[[int], None] = lambda number: None):
        self.info = EngineInfo(1 << 20, 64, 2048, 16, 1, 0, 0, 1, 1, 1, 128, (2,), 0, None)
        self.requests: dict[str, list[int]] = {}  # id -> tokens sampled, most tokens
        self.numbers = iter(range(10**9))
        self.before_step = before_step
        self.calls: deque[str] = deque()
        self.threads: set[int] = set()

    def add(self, requests: list[EngineRequest]) -> None:
        self._note("add")
        self.requests |= {request.request_id: [0, request.max_tokens] for request in requests}

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        self._note("abort")
        for request_id, _ in answers:
            self.requests.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[StepOutput]:
        self._note("step")
        self.before_step(next(self.numbers))
        outputs: list[StepOutput] = []
        for request_id, counts in list(self.requests.items()):
            counts[0] += 1
            done = counts[0] == counts[1]
            outputs.append(TokenOutput(request_id, 0, 7, None, "length" if done else None, None, (1, 2, 3)))
            if done:
                del self.requests[request_id]
        return outputs

    def rest(self) -> None:
        """Nothing has to be looked after."""

    def check_ready(self) -> None:
        """It always is."""

    def stats(self) -> EngineStats:
        self._note("stats")
        return EngineStats(0, 0, len(self.requests), 0)

    def reset_prefix_cache(self) -> None:
        self._note("reset")

    def close(self) -> None:
        self._note("close")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())


Fake = Callable[[FakeEngine], LLM]


@pytest.fixture
def fake(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = []

    def make(engine: FakeEngine) -> LLM:
        monkeypatch.setattr(distkv.frontend.front_end, "launch", lambda config, check: engine)
        made.append(LLM(tiny_model))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def test_one_thread_alone_calls_the_engine(fake: Fake) -> None:
    engine = FakeEngine()
    llm = fake(engine)
    output = llm.generate([[5], [6]], GREEDY, use_tqdm=False)[1]
    assert (output.num_cached_tokens, output.num_cached_tokens_by_tier) == (6, {"device": 1, "host": 2, "disk": 3})
    llm.stats()
    llm.reset_prefix_cache()
    llm.close()
    llm.close()
    assert [call for call in engine.calls if call != "step"] == ["add", "stats", "reset", "close"]
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


def test_an_idle_engine_is_left_alone(fake: Fake) -> None:
    engine = FakeEngine()
    llm = fake(engine)
    llm.generate([[5]], GREEDY, use_tqdm=False)
    llm.stats()
    calls = len(engine.calls)
    time.sleep(0.05)
    assert len(engine.calls) == calls


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_aborts_and_leaves_the_llm_usable(fake: Fake, stream: bool) -> None:
    engine = FakeEngine(lambda number: time.sleep(0.01))
    llm = fake(engine)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        list(llm.stream([5], LONG)) if stream else llm.generate([[5], [6]], LONG, use_tqdm=False)
    timer.join()
    assert llm.stats().num_running == 0
    assert "abort" in engine.calls
    assert llm.generate([[5]], SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_a_dead_engine_is_told_to_all_and_nothing_hangs(fake: Fake) -> None:
    def die(number: int) -> None:
        time.sleep(0.01)
        if number >= 10:
            raise WorkerDied(1, "node", "it was killed")

    engine = FakeEngine(die)
    llm = fake(engine)

    def pending(number: int) -> None:
        with pytest.raises(WorkerDied, match="it was killed"):
            llm.generate([[5], [6]], LONG, use_tqdm=False) if number % 2 else list(llm.stream([5], LONG))

    run_threads([lambda number=number: pending(number) for number in range(6)])
    steps = engine.calls.count("step")
    for later in (
        lambda: llm.generate([[5]], use_tqdm=False),
        lambda: next(llm.stream([5])),
        llm.stats,
        llm.reset_prefix_cache,
    ):
        with pytest.raises(WorkerDied, match="it was killed"):
            later()
    llm.close()
    assert engine.calls.count("step") == steps and engine.calls[-1] == "close"


def test_a_death_between_steps_is_one_too(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise WorkerDied(0, "node", "gone")

    for call in ("add", "stats", "abort"):
        engine = FakeEngine(lambda number: time.sleep(0.001))
        llm = fake(engine)
        stream = llm.stream([5], LONG)
        next(stream)
        monkeypatch.setattr(engine, call, die)
        if call == "abort":
            stream.close()
        else:
            with pytest.raises(WorkerDied):
                llm.stats() if call == "stats" else llm.generate([[6]], use_tqdm=False)
            with pytest.raises(WorkerDied):
                list(stream)
        with pytest.raises(WorkerDied):
            llm.generate([[6]], use_tqdm=False)


def test_an_engine_goes_on_after_another_exception(fake: Fake) -> None:
    once = iter([ValueError("a bug")])

    def stumble(number: int) -> None:
        time.sleep(0.001)
        if len(engine.requests) == 2 and (error := next(once, None)):
            raise error

    engine = FakeEngine(stumble)
    llm = fake(engine)
    other = llm.stream([6], LONG)
    next(other)
    with pytest.raises(ValueError, match="a bug"):
        llm.generate([[5]], LONG, use_tqdm=False)
    with pytest.raises(ValueError, match="a bug"):
        list(other)
    assert llm.stats().num_running == 0
    assert llm.generate([[5]], GREEDY, use_tqdm=False)[0].finished


def test_a_request_that_fails_alone_has_its_error(fake: Fake) -> None:
    engine = FakeEngine()
    llm = fake(engine)
    step = engine.step

    def failing() -> list[StepOutput]:
        outputs = step()
        if len(engine.calls) < 6:
            return outputs
        failed = next(iter(engine.requests), None)
        engine.requests.pop(failed, None) if failed else None
        return [RequestFailed(failed, "StoreError", "on fire")] if failed else outputs

    engine.step = failing  # type: ignore[method-assign]
    [output] = llm.generate([[5]], LONG, use_tqdm=False)
    assert "on fire" in str(output.error) and output.outputs[0].finish_reason == "error"
    with pytest.raises(DistKVError, match="on fire"):
        list(llm.stream([5], LONG))
    streamed = {}
    for kind in RequestOutputKind:
        engine.calls.clear()
        [again] = llm.generate([[5]], of_kind(LONG, kind), use_tqdm=False)
        assert again.outputs == output.outputs and again.finished and "on fire" in str(again.error)
        engine.calls.clear()
        outputs: list[RequestOutput] = []
        with pytest.raises(DistKVError, match="on fire"):
            outputs.extend(llm.stream([5], of_kind(LONG, kind)))
        streamed[kind] = outputs
    *_, last = streamed[RequestOutputKind.CUMULATIVE]
    assert last.outputs[0].token_ids == output.outputs[0].token_ids and not last.finished
    assert join_deltas(streamed[RequestOutputKind.DELTA]).outputs == last.outputs
    assert not streamed[RequestOutputKind.FINAL_ONLY]


def test_closing_ends_what_runs(fake: Fake) -> None:
    engine = FakeEngine(lambda number: time.sleep(0.005))
    llm = fake(engine)

    def pending() -> None:
        with pytest.raises(DistKVError, match="closed while this request ran"):
            llm.generate([[5]], LONG, use_tqdm=False)

    def closing() -> None:
        while not engine.requests:
            time.sleep(0.001)
        llm.close()

    run_threads([pending, closing])
    assert engine.calls[-1] == "close"
    for later in (lambda: llm.generate([[5]], use_tqdm=False), llm.stats, lambda: next(llm.stream([5]))):
        with pytest.raises(DistKVError, match="closed; make a new one"):
            later()


def test_closing_an_async_llm_ends_what_runs(tiny_model: Path) -> None:
    async def main() -> None:
        llm = await AsyncLLM.create(tiny_model, **OPTIONS)
        outputs: list[AsyncIterator] = [llm.generate([5, number], LONG) for number in range(3)]
        for one in outputs:
            await anext(one)
        await llm.close()
        for one in outputs:
            with pytest.raises(DistKVError, match="closed while this request ran"):
                async for _ in one:
                    pass
        with pytest.raises(DistKVError, match="make a new one"):
            await llm.stats()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_error_of_closing_is_raised_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    llm = fake(engine)

    def fail() -> None:
        raise OSError("the folder is gone")

    monkeypatch.setattr(engine, "close", fail)
    with pytest.raises(OSError, match="the folder is gone"):
        llm.close()
    llm.close()


@pytest.mark.parametrize("is_told", [False, True])
def test_what_ends_an_idle_engine_is_raised_by_close_unless_it_was_told(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_told: bool
) -> None:
    engine = FakeEngine()
    rested = threading.Event()

    def die() -> None:
        rested.set()
        raise WorkerDied(1, "node", "it was killed")

    monkeypatch.setattr(engine, "rest", die)
    llm = fake(engine)
    assert rested.wait(60)
    if is_told:
        with pytest.raises(WorkerDied):
            llm.stats()
        llm.close()
    else:
        with pytest.raises(WorkerDied):
            llm.close()
    llm.close()
    assert engine.calls[-1] == "close" and "the engine has ended: rank 1" in caplog.text


def test_an_llm_that_nobody_holds_closes_itself(fake: Fake, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(distkv.frontend.front_end, "launch", lambda config, check: engine)
    llm = LLM(tiny_model)
    llm.generate([[5]], GREEDY, use_tqdm=False)
    ended = llm._front_end.thread._loop.ended
    del llm
    gc.collect()
    assert ended.wait(60)
    assert engine.calls[-1] == "close"


def test_an_answer_that_cannot_be_decoded_does_not_hang(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such token")

    monkeypatch.setattr("distkv.frontend.answer.Answer.add", fail)

    async def test(llm: AsyncLLM) -> None:
        with pytest.raises(ValueError, match="no such token"):
            await last_tokens(llm, [5])

    with_async(tiny_model, test)
