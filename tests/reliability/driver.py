"""A process that owns an engine and does what it is told, a line of JSON at a time.

`python driver.py [FILE]` runs the Python of FILE first, if there is one: a fault that lies in the process itself. It
reads commands from stdin, writes events to stdout, and ends with stdin.
"""

import asyncio
import json
import logging
import os
import runpy
import sys
import threading
import time
from typing import Any

EVENTS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what others print does not come between


def tell(event: str, **what: Any) -> None:
    """Sends an event."""
    EVENTS.write(json.dumps({"event": event, **what}) + "\n")


class Driver:
    """Each method is a command."""

    def __init__(self) -> None:
        self.llm: Any = None

    async def start(self, model: str, options: dict[str, Any]) -> None:
        """Makes the engine."""
        began = time.monotonic()
        try:
            from distkv import AsyncLLM

            self.llm = await AsyncLLM.create(model, **options)
        except Exception as error:
            tell("start_failed", error=_name(error))
            return
        tell("started", seconds=time.monotonic() - began)

    async def ask(self, request: str, prompt: list[int], params: dict[str, Any], salt: str | None) -> None:
        """Streams the answers to a prompt."""
        from distkv import SamplingParams
        from distkv.sampling_params import RequestOutputKind

        wanted = SamplingParams(ignore_eos=True, output_kind=RequestOutputKind.DELTA, **params)
        cached, last = 0, None
        try:
            async for output in self.llm.generate(prompt, wanted, cache_salt=salt):
                for answer in output.outputs:
                    if answer.token_ids:
                        tell("tokens", request=request, index=answer.index, tokens=list(answer.token_ids))
                cached, last = output.num_cached_tokens, output
        except Exception as error:
            tell("ended", request=request, error=_name(error), cached=cached)
            return
        assert last is not None and last.finished
        tell("ended", request=request, error=None, cached=cached)

    async def stats(self) -> None:
        """What the engine tells of itself."""
        try:
            stats = await self.llm.stats()
        except Exception as error:
            tell("stats", error=_name(error))
            return
        tell(
            "stats", error=None, pages_in_use=stats.pages_in_use, running=stats.num_running, waiting=stats.num_waiting,
            engines=stats.num_engines, recomputed=stats.pages_recomputed, checksum_failures=stats.checksum_failures,
        )  # fmt: skip

    async def inspect(self, address: str) -> None:
        """What the Ray cluster says is taken of it."""
        tell("inspected", **await asyncio.to_thread(_inspect, address))

    async def close(self) -> None:
        """Closes the engine."""
        llm, self.llm = self.llm, None
        try:
            if llm is not None:
                await llm.close()
        except Exception as error:
            tell("closed", error=_name(error))
            return
        tell("closed", error=None)


def _inspect(address: str) -> dict[str, Any]:
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        states = [group["state"] for group in ray.util.placement_group_table().values()]
        free, total = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
        return {"groups": sum(state != "REMOVED" for state in states), "cpus_taken": total - free}
    finally:
        if is_ours:
            ray.shutdown()


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def main() -> None:
    driver, loop, tasks = Driver(), asyncio.get_running_loop(), set()
    commands: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(commands.put_nowait, json.loads(line))
        loop.call_soon_threadsafe(commands.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    tell("ready", pid=os.getpid())
    while (command := await commands.get()) is not None:
        task = asyncio.create_task(getattr(driver, command.pop("do"))(**command))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("distkv").setLevel(logging.INFO)
    if len(sys.argv) > 1:
        runpy.run_path(sys.argv[1])
    asyncio.run(main())
