"""An LLM that takes no more requests, and what becomes of those that run."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.scripted_engine import ScriptedEngine

from distkv import LLM, AsyncLLM, DistKVError, Draining, RequestOutput, SamplingParams
from distkv.engine.thread import EngineThread

LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def test_what_runs_ends_by_itself_and_nothing_begins(tiny_model: Path) -> None:
    with LLM(tiny_model, page_size=16, device_kv_bytes="4MiB") as llm:
        stream = llm.stream([5], SHORT)
        next(stream)
        drained = threading.Thread(target=llm.drain)
        drained.start()
        with pytest.raises(Draining, match="takes no more requests"):
            while True:  # until the other thread has come to it
                llm.generate([[6]], SamplingParams(max_tokens=1), use_tqdm=False)
        assert len(list(stream)[-1].outputs[0].token_ids) == 20
        drained.join()
        assert llm.stats().num_running == 0
        llm.drain(0)
    with pytest.raises(DistKVError, match="closed"):
        llm.drain()


def test_what_does_not_end_in_time_is_ended_with_its_answer_so_far(tiny_model: Path) -> None:
    async def first(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
        return await anext(outputs)

    async def main() -> None:
        async with await AsyncLLM.create(tiny_model, page_size=16, device_kv_bytes="4MiB") as llm:
            answers = [llm.generate([number], LONG) for number in range(3)]
            begun = [await first(one) for one in answers]
            await llm.drain(0)
            with pytest.raises(Draining):
                await llm.check_ready()
            llm.check_health()
            for before, answer in zip(begun, answers, strict=True):
                with pytest.raises(Draining, match="ended this request before it was done") as ended:
                    async for _ in answer:
                        pass
                output = ended.value.output
                assert output is not None and output.finished and output.outputs[0].finish_reason == "error"
                so_far = before.outputs[0].token_ids
                assert output.outputs[0].token_ids[: len(so_far)] == so_far
            assert (await llm.stats()).pages_in_use == 0

    asyncio.run(main())


def test_outputs_of_a_call_that_is_ended_are_returned(tiny_model: Path) -> None:
    with LLM(tiny_model, page_size=16, device_kv_bytes="4MiB", max_num_seqs=2) as llm:

        def end() -> None:
            while not llm.stats().num_running:
                pass
            llm.drain(0)

        caller = threading.Thread(target=end)
        caller.start()
        outputs = llm.generate([[number] for number in range(8)], LONG, use_tqdm=False)
        caller.join()
    assert len(outputs) == 8 and isinstance(outputs[-1].error, Draining)
    assert all((output.error is None) == (output.outputs[0].finish_reason == "length") for output in outputs)


def test_who_stops_waiting_for_a_drain_calls_nothing_off() -> None:
    thread = EngineThread(lambda check: ScriptedEngine([5]))
    thread.wait()
    is_tried = threading.Event()
    thread.call(lambda engine: is_tried.wait(20))
    drained = thread.drain(at_once=True)
    assert not drained.cancel()  # as a task that is cancelled would
    is_tried.set()
    drained.result(20)
    thread.check_alive()
    thread.close()
