"""An hour's worth of mixed traffic in some minutes: what a server holds levels off, and every page is accounted for."""

import asyncio
import itertools
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from support.servers import ServerProcess

ROUNDS, REQUESTS, AT_A_TIME = 24, 250, 32
WARM = 8  # rounds, after which caches of all kinds have filled
MOST_GROWTH = 2500
"""Bytes of resident memory per request. Python's table of interned strings, into which pathlib puts the parts of each
path, takes half of that for a while, and is then made anew; a request that nobody forgets would take more."""


class Held(NamedTuple):
    """What a process holds."""

    memory: int  # bytes
    files: int
    threads: int


def held(pid: int) -> Held:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Held(int(status["VmRSS"].split()[0]) * 1024, files, int(status["Threads"]))


async def ask(client: httpx2.AsyncClient, random: random.Random) -> None:
    """One request of some kind: whole, streamed, left early, cancelled, refused, of a chat, of a session."""
    prompt = [40 + random.randrange(8)] * 64 + [40 + random.randrange(80) for _ in range(random.randrange(1, 100))]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": random.randrange(1, 40), "n": random.choice([1, 1, 3])}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    match random.randrange(10):
        case 0 | 1 | 2:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200
        case 3 | 4:
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "logprobs": 2}) as stream:
                assert (await stream.aread()).endswith(b"[DONE]\n\n")
        case 5:
            async with client.stream(
                "POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 900}
            ) as stream:
                async for _ in stream.aiter_bytes():
                    break
        case 6:
            task = asyncio.create_task(client.post("/v1/completions", json=body | {"max_tokens": 900}))
            await asyncio.sleep(random.random() / 5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        case 7:
            wrong = random.choice([{"temperature": -1}, {"top_q": 1}, {"prompt": [10**6]}, {"model": "other"}])
            assert (await client.post("/v1/completions", json=body | wrong)).status_code in (400, 404)
        case 8:
            assert (await client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 8})).is_success
        case 9:
            session = {"session": f"soak-{random.randrange(10**6)}"}
            assert (await client.post("/v1/chat/completions", json=chat | session)).status_code == 200


async def play(url: str, seed: int) -> None:
    """A round of requests."""
    choices = random.Random(seed)
    slots = asyncio.Semaphore(AT_A_TIME)

    async def one(client: httpx2.AsyncClient, seed: int) -> None:
        async with slots:
            await ask(client, random.Random(seed))

    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(one(client, choices.randrange(2**32)) for _ in range(REQUESTS)))


def slope(values: Sequence[int]) -> float:
    """Growth per round: the median of the slopes between any two, in which a single step, as allocators take them when
    one more thread gets a pool of its own, does not count."""
    pairs = itertools.combinations(range(len(values)), 2)
    return statistics.median((values[later] - values[first]) / (later - first) for first, later in pairs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_a_server_holds_levels_off(talker: Path, tmp_path: Path) -> None:
    flags = (
        "--page-size", "16", "--max-num-batched-tokens", "256", "--device-kv-bytes", "2MiB", "--host-kv-bytes", "1MiB",
        "--disk-kv-bytes", "2MiB", "--cache-dir", str(tmp_path), "--num-threads", "1", "--max-num-seqs", "16",
    )  # fmt: skip
    with ServerProcess(talker, *flags, env=os.environ | {"MALLOC_ARENA_MAX": "2"}) as server:
        samples = []
        for seed in range(ROUNDS):
            asyncio.run(play(server.url, seed))
            server.await_idle()
            samples.append(held(server.process.pid))
        assert server.terminate() == 0
        assert "Traceback" not in server.log, server.log
    memory, files, threads = (slope(values) for values in zip(*samples[WARM:], strict=True))
    assert memory < MOST_GROWTH * REQUESTS and files == threads == 0, samples
