"""Clients of a server that leave, and what is no request or an odd one."""

import asyncio
import random
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from reliability.counts import Try
from reliability.faults import fault
from reliability.odd_requests import BROKEN, odd_body
from reliability.trial import Trial
from support.servers import ServerProcess, save_talker

FLAGS = (
    "--page-size", "16", "--device-kv-bytes", "1MiB", "--host-kv-bytes", "512KiB", "--disk-kv-bytes", "4MiB",
    "--num-threads", "1", "--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-queued-requests", "4096",
)  # fmt: skip
AT_A_TIME = 32
LATE = 60.0  # seconds
MOST_GROWTH = 150 * 2**20  # of resident memory in a try, of which allocators take the most


@contextmanager
def checked_server(trial: Trial) -> Iterator[ServerProcess]:
    """A server that must hold nothing in the end, and give the answers that it gave in the beginning."""
    with tempfile.TemporaryDirectory(prefix="distkv-rel-") as folder:
        model = save_talker(Path(folder) / "talker")
        with ServerProcess(model, *FLAGS, "--cache-dir", f"{folder}/cache") as server:
            wanted = [_answer(server, seed) for seed in range(8)]
            memory = _memory(server)
            yield server
            record = trial.record
            try:
                server.await_idle()
            except AssertionError as error:
                record.leaked.append(f"an idle server: {error}")
            for seed, known in enumerate(wanted):
                record.answers += 1
                if (found := _answer(server, seed)) != known:
                    record.wrong.append(f"answer {seed} is {found}, not {known}")
            if (growth := _memory(server) - memory) > MOST_GROWTH:
                record.leaked.append(f"{growth} bytes of memory")
            if "Traceback" in server.log:
                record.unexplained.append(server.log[-2000:])
            if (code := server.terminate()) != 0:
                record.unexplained.append(f"the exit code is {code}")


@fault("clients-leave", "2,000 requests to a server that are cancelled at random moments", 5)
def _leave(trial: Trial) -> None:
    with checked_server(trial) as server:
        asyncio.run(_cancel(server.url, trial.random, trial.record, 2000))


@fault("bodies-odd", "1,000 bodies that are no requests, or odd ones, to all routes", 5)
def _send_odd_bodies(trial: Trial) -> None:
    with checked_server(trial) as server:
        asyncio.run(_send(server.url, [odd_body(trial.random) for _ in range(1000)], trial.record))


@fault("http-broken", "200 connections on which something else comes than HTTP, or a part of it", 5)
def _break_http(trial: Trial) -> None:
    with checked_server(trial) as server:
        host, port = server.url.removeprefix("http://").split(":")
        kept = []
        for _ in range(200):
            connection = socket.create_connection((host, int(port)), timeout=LATE)
            with suppress(OSError):  # it was closed before all was sent
                connection.sendall(trial.random.choice(BROKEN)(trial.random))
            if trial.random.random() < 0.5:
                kept.append(connection)  # half open
            else:
                connection.close()
        _answer(server, 0)
        for connection in kept:
            connection.setblocking(False)
            with suppress(OSError):
                if b" 500 " in connection.recv(65536)[:15]:
                    trial.record.unexplained.append("status 500")
            connection.close()


async def _cancel(url: str, rng: random.Random, record: Try, count: int) -> None:
    slots = asyncio.Semaphore(AT_A_TIME)

    async def ask(client: httpx2.AsyncClient, seconds: float, body: dict[str, Any]) -> None:
        async with slots:
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            done, _ = await asyncio.wait([task], timeout=seconds)
            if done and not task.exception() and task.result().status_code != 200:
                record.unexplained.append(task.result().text)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def body(number: int) -> dict[str, Any]:
        prompt = [40 + rng.randrange(8)] * 40 + [rng.randrange(40, 200) for _ in range(rng.randrange(200))]
        return {
            "prompt": prompt, "max_tokens": rng.randrange(1, 300), "n": rng.choice([1, 1, 3]),
            "stream": rng.random() < 0.5, "ignore_eos": True, "seed": number,
        }  # fmt: skip

    async with httpx2.AsyncClient(base_url=url, timeout=LATE) as client:
        await asyncio.gather(*(ask(client, rng.random() ** 2 / 2, body(number)) for number in range(count)))


async def _send(url: str, requests: list[tuple[str, bytes]], record: Try) -> None:
    slots = asyncio.Semaphore(8)

    async def send(client: httpx2.AsyncClient, path: str, body: bytes) -> None:
        async with slots:
            began = time.monotonic()
            try:
                answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            except httpx2.HTTPError as error:
                record.hung.append(f"{path} {body[:200]!r}: {error!r} after {time.monotonic() - began:.0f} s")
                return
            if answer.status_code >= 500 or b'"server_error"' in answer.content:
                record.unexplained.append(f"{path} {body[:500]!r}: {answer.status_code} {answer.text[:300]}")
            elif answer.status_code >= 400 and not answer.json()["error"]["message"]:
                record.unexplained.append(f"{path} {body[:500]!r}: an error without words")

    async with httpx2.AsyncClient(base_url=url, timeout=LATE) as client:
        await asyncio.gather(*(send(client, path, body) for path, body in requests))


def _answer(server: ServerProcess, seed: int) -> str:
    body = {"prompt": [9 + seed] * 40, "max_tokens": 8, "temperature": 1.0, "seed": seed, "ignore_eos": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def _memory(server: ServerProcess) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    [kib] = re.findall(r"VmRSS:\s+(\d+)", status)
    return int(kib) * 1024
