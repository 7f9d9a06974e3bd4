"""Collectives in memory that ranks share; the ranks are threads here, and processes in `tests/launch`."""

import gc
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run_code
from torch import Tensor

from distkv.workers.group import shared_memory
from distkv.workers.group.process_group import open_store
from distkv.workers.group.shared_memory import CAPACITY, SharedMemory


def on_ranks(size: int, run: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def join_all(size: int) -> list[SharedMemory | None]:
    store = open_store("127.0.0.1")
    return on_ranks(size, lambda rank: SharedMemory.join(open_store("127.0.0.1", store.port), rank, size))


@pytest.fixture(scope="module")
def ranks() -> list[SharedMemory]:
    joined = [one for one in join_all(3) if one is not None]
    assert len(joined) == 3
    return joined


def parts_of(dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [(torch.randn(count, generator=generator) * 10.0**rank).to(dtype) for rank in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 15, 576, CAPACITY + 17])  # the last goes through in several pieces
def test_sums_are_taken_in_the_order_of_ranks(ranks: list[SharedMemory], dtype: torch.dtype, count: int) -> None:
    parts = parts_of(dtype, count)
    expected = ((parts[0].float() + parts[1].float()) + parts[2].float()).to(dtype)
    results = [part.clone() for part in parts]
    for _ in range(3):  # slots take turns
        for result, part in zip(results, parts, strict=True):
            result.copy_(part)
        on_ranks(3, lambda rank: ranks[rank].all_reduce(results[rank]))
        for result in results:
            assert torch.equal(result, expected)


@pytest.mark.parametrize("count", [1, 49152, CAPACITY + 17])
def test_parts_reach_who_wants_them(ranks: list[SharedMemory], count: int) -> None:
    parts = [part.view(1, count) for part in parts_of(torch.bfloat16, count)]
    for wanting in range(3):
        gathered = on_ranks(3, lambda rank, one=wanting: ranks[rank].gather(parts[rank], wanted=rank == one))
        assert [part is None for part in gathered] == [rank != wanting for rank in range(3)]
        assert torch.equal(gathered[wanting], torch.stack(parts))


def test_ranks_that_come_late_are_waited_for(ranks: list[SharedMemory]) -> None:
    """Past the time in which they are looked for without a break."""

    def run(rank: int) -> Tensor | None:
        time.sleep(0.1 * rank)
        return ranks[rank].gather(torch.tensor([rank]), wanted=True)

    for gathered in on_ranks(3, run):
        assert gathered.flatten().tolist() == [0, 1, 2]


def test_one_that_cannot_see_the_memory_leaves_all_to_sockets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attach = shared_memory._attach

    def fails_once(*arguments: Any) -> Any:
        monkeypatch.setattr(shared_memory, "_attach", attach)
        raise OSError("no such process here")

    monkeypatch.setattr(shared_memory, "_attach", fails_once)
    assert join_all(3) == [None] * 3
    assert "which is slow: no such process here" in caplog.text


def test_ranks_on_several_hosts_do_not_try(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = iter(["here", "there"])
    monkeypatch.setattr(shared_memory.socket, "gethostname", lambda: next(names))
    monkeypatch.setattr(shared_memory, "_attach", lambda *_: (_ for _ in ()).throw(FileNotFoundError("/proc/1/fd/3")))
    assert join_all(2) == [None, None]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert "exchange over sockets" in caplog.text


def test_another_file_in_its_place_is_not_taken(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("127.0.0.1")
    (tmp_path / "link").symlink_to("/etc/hostname")
    store.set("shared memory", f"{tmp_path / 'link'} 00")
    with pytest.raises(ValueError, match="another file"):
        shared_memory._attach(store, 4096)


def test_ranks_that_do_not_agree_are_told(ranks: list[SharedMemory]) -> None:
    def run(rank: int) -> str:
        try:
            ranks[rank].all_reduce(torch.zeros(8 if rank else 16))
        except RuntimeError as error:
            return str(error)
        return ""

    assert all("different numbers of bytes" in said for said in on_ranks(3, run))


def test_a_rank_whose_process_is_gone_is_not_waited_for() -> None:
    ended = run_code(
        "import os, sys, torch\n"
        "from distkv.workers.group.process_group import open_store\n"
        "from distkv.workers.group.shared_memory import SharedMemory\n"
        "store = open_store('127.0.0.1')\n"
        "child = os.fork()\n"
        "other = open_store('127.0.0.1', store.port)\n"
        "memory = SharedMemory.join(other, 0 if child else 1, 2)\n"
        "x = torch.ones(4)\n"
        "memory.all_reduce(x)\n"
        "if not child: os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "try: memory.all_reduce(x)\n"
        "except RuntimeError as error: print(x.tolist(), error)\n"
    )
    assert ended.stdout.strip() == "[2.0, 2.0, 2.0, 2.0] the process of rank 1 is gone", ended.stderr


def test_no_descriptor_is_left() -> None:
    def descriptors() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum("distkv-ranks" in os.readlink(link) for link in links if link.is_symlink())

    before = descriptors()
    joined = join_all(2)
    assert all(joined) and descriptors() > before
    del joined
    gc.collect()
    assert descriptors() == before
