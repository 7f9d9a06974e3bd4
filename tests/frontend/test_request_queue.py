"""How many answers may wait, and that whoever asks for more is told so at once."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from pathlib import Path

import pytest

from distkv import LLM, AsyncLLM, CapacityError, QueueFull, SamplingParams
from distkv.frontend.request_queue import RequestQueue

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def test_places_are_given_back() -> None:
    queue = RequestQueue(2, num_running=3)
    with queue.taken(3), queue.taken(1):
        with pytest.raises(QueueFull, match=r"1 answers wait for their turn, and max_queued_requests is 2"):
            queue.taken(2).__enter__()
        with queue.taken(1), pytest.raises(QueueFull, match="2 answers wait"):
            queue.taken(1).__enter__()
    assert queue.num_refused == 3
    with queue.taken(5):
        pass
    with pytest.raises(CapacityError, match="6 answers are asked for at once, and 5 can run and wait") as refused:
        queue.taken(6).__enter__()
    assert not isinstance(refused.value, QueueFull), "it never has a place"
    with ExitStack() as all_of_them:
        for _ in range(1000):
            all_of_them.enter_context(RequestQueue(None, num_running=1).taken(1000))


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, page_size=16, device_kv_bytes="4MiB", max_num_seqs=2, max_queued_requests=1) as llm:
        yield llm


def test_a_caller_is_told_and_may_come_again(llm: LLM) -> None:
    with pytest.raises(CapacityError, match="4 answers are asked for at once, and 3 can run and wait"):
        llm.generate([[5], [6], [7], [8]], SHORT, use_tqdm=False)
    streams = [llm.stream([5, 6], LONG) for _ in range(4)]
    for stream in streams[:2]:
        next(stream)
    with pytest.raises(QueueFull):
        llm.generate([[5], [6]], SHORT, use_tqdm=False)
    streams[0].close()
    assert len(llm.generate([[5], [6]], SHORT, use_tqdm=False)) == 2
    streams[1].close()
    assert llm.stats().num_refused == 2
    with llm._front_end.queue.taken(3):
        """Nothing was kept back."""


def test_a_task_that_is_refused_leaves_the_others_alone(tiny_model: Path) -> None:
    async def main() -> None:
        options = {"page_size": 16, "device_kv_bytes": "4MiB", "max_num_seqs": 1, "max_queued_requests": 0}
        async with await AsyncLLM.create(tiny_model, **options) as llm, aclosing(llm.generate([5, 6], LONG)) as first:
            await anext(first)
            with pytest.raises(QueueFull):
                await anext(llm.generate([7, 8], SHORT))
            output = [output async for output in first][-1]
            assert len(output.outputs[0].token_ids) == 200
            assert [output async for output in llm.generate([7, 8], SHORT)][-1].finished

    asyncio.run(main())
