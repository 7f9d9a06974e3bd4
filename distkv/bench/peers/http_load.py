"""Loads a server with streamed completions and times their tokens."""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import httpx2

from distkv.bench.peers.engines import SERVED
from distkv.bench.peers.guarded import PeerFailed
from distkv.bench.peers.workloads import Work
from distkv.reporting.machine import percentile

UNLIMITED = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass(frozen=True)
class Streamed:
    """One answer; times in seconds since its request was sent."""

    arrivals: list[float]  # of its pieces
    num_tokens: int

    @property
    def between_tokens(self) -> float:
        """Mean seconds of a token after the first, however many tokens a piece has; 0 where all came in one."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_tokens - 1)


def is_ready(url: str) -> bool:
    """Whether the server answers a request. Raises PeerFailed when it refuses it."""
    body = _body([11, 12, 13], 2)
    try:
        with httpx2.Client(trust_env=False, timeout=60) as client:
            response = client.post(f"{url}/v1/completions", json=body)
    except httpx2.TransportError:
        return False
    if 400 <= response.status_code < 500 and response.status_code != 404:
        raise PeerFailed(f"its server refused a request: {response.text[:200]}")
    return response.status_code == 200


def load(url: str, work: Work, time_limit: float) -> dict[str, float]:
    """Figures of the whole work. Raises PeerFailed for what goes wrong, and after `time_limit` seconds."""
    try:
        seconds, answers = asyncio.run(_load(url, work, time_limit))
    except TimeoutError:
        raise PeerFailed(f"its server took longer than {time_limit:g} s, the time limit") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PeerFailed(f"its server's answer cannot be understood: {type(error).__name__}: {error}") from error
    except httpx2.HTTPError as error:
        raise PeerFailed(f"its server broke off: {type(error).__name__}: {error}") from error
    first = [answer.arrivals[0] for answer in answers]
    gaps = [later - earlier for answer in answers for earlier, later in pairwise(answer.arrivals)]
    if not gaps:
        raise PeerFailed("its server sent every answer in one piece, so that it does not stream")
    return {
        "output_tokens_per_s": sum(answer.num_tokens for answer in answers) / seconds,
        "first_token_p50_ms": 1e3 * percentile(first, 0.5),
        "first_token_p99_ms": 1e3 * percentile(first, 0.99),
        "between_tokens_p50_ms": 1e3 * statistics.median(answer.between_tokens for answer in answers),
        "between_tokens_p99_ms": 1e3 * percentile(gaps, 0.99),
    }


async def _load(url: str, work: Work, time_limit: float) -> tuple[float, list[Streamed]]:
    requests = iter(zip(work.prompts, work.new_tokens, strict=True))
    answers: list[Streamed] = []

    async def stream() -> None:
        for prompt, count in requests:  # which all streams share
            answers.append(await _answer(client, prompt, count))

    connect = partial(httpx2.AsyncClient, base_url=url, limits=UNLIMITED, timeout=None, trust_env=False)
    async with asyncio.timeout(time_limit), connect() as client:
        start = time.perf_counter()
        tasks = [asyncio.create_task(stream()) for _ in range(work.size)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return time.perf_counter() - start, answers


async def _answer(client: httpx2.AsyncClient, prompt: list[int], count: int) -> Streamed:
    arrivals: list[float] = []
    num_tokens = 0
    start = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=_body(prompt, count)) as response:
        if response.status_code != 200:
            raise PeerFailed(f"its server answered {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            piece = json.loads(line.removeprefix("data:"))
            if piece.get("choices"):
                arrivals.append(time.perf_counter() - start)
            if piece.get("usage"):
                num_tokens = piece["usage"]["completion_tokens"]
    if num_tokens != count or not arrivals:
        raise PeerFailed(f"its server answered with {num_tokens} tokens in {len(arrivals)} pieces instead of {count}")
    return Streamed(arrivals, num_tokens)


def _body(prompt: list[int], count: int) -> dict[str, Any]:
    return {
        "model": SERVED, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
