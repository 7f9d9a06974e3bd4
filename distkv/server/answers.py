"""Requests of one client, answered together."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from distkv.outputs import RequestOutput
from distkv.server.service import Service

Outputs = AsyncGenerator[RequestOutput, None]
"""Of one request: the deltas of its answers, or the finished ones."""


async def answer_all(service: Service, num_answers: int, outputs: Sequence[Outputs]) -> AsyncGenerator:
    """Runs requests together and yields `(index, output)` as outputs come, each of the request with that index.

    Closing it ends all of them. Raises what the first of them to fail raises, and CapacityError for more answers than
    can ever run and wait.

    Args:
        num_answers: how many answers they have together.
        outputs: of each request, as `AsyncLLM.generate` gives them; none runs before it is iterated.
    """
    service.llm.check_count(num_answers)
    if len(outputs) == 1:
        async with aclosing(outputs[0]) as only:
            async for output in only:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_put(queue, index, one)) for index, one in enumerate(outputs)]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _put(queue: asyncio.Queue, index: int, outputs: Outputs) -> None:
    try:
        async with aclosing(outputs):
            async for output in outputs:
                queue.put_nowait((index, output))
        queue.put_nowait((index, None))
    except Exception as error:
        queue.put_nowait((index, error))
