"""What the system is asked to bring from disk, when, and that it does."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.page_cache import forget, is_held, refuse_fadvise, tell_nothing
from support.pages import random_page, same

from distkv.storage.disk.disk_array import make_array
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools import disk_prefetch
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.disk_prefetch import DiskPrefetch
from distkv.storage.tier import Tier


class AtOnce:
    """An executor whose tasks are done when they are given."""

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        task: Future[Any] = Future()
        task.set_result(work(*arguments))
        return task


@settings(max_examples=200)
@given(
    num_pages=st.integers(1, 40), num_layers=st.integers(1, 9), heads=st.integers(1, 3), ahead=st.integers(0, 12),
    window=st.integers(0, 8), task=st.integers(1, 7), cold=st.integers(0, 60), least=st.integers(0, 12),
)  # fmt: skip
def test_each_slice_is_asked_for_once_and_in_time(
    num_pages: int, num_layers: int, heads: int, ahead: int, window: int, task: int, cold: int, least: int
) -> None:
    """From about the first that is on disk alone, not much further ahead than memory may be filled, and in the order of
    the reads."""
    spec = PageSpec(num_layers=num_layers, num_kv_heads=heads, page_size=16, head_dim=8, dtype="float32")
    size = spec.slice_bytes_in(Tier.DISK)
    told: list[tuple[int, int, int]] = []
    total, distance = num_pages * num_layers, max(1, min(ahead, max(num_pages, least)))
    windows = max(1, min(window, ahead // num_pages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_prefetch, "AHEAD_BYTES", ahead * size)
        patch.setattr(disk_prefetch, "LEAST_BYTES", least * size)
        patch.setattr(disk_prefetch, "REQUEST_BYTES", window * size // heads)
        patch.setattr(disk_prefetch, "TASK_BYTES", task * size)
        prefetch = DiskPrefetch(
            AtOnce(), lambda page, layer: layer * num_pages + page < cold, lambda *one: told.append(one),  # type: ignore[arg-type]
            num_pages, spec,
        )  # fmt: skip
        asked: set[tuple[int, int]] = set()
        begun = None
        for number in range(total):
            count = len(told)
            prefetch.reach(number)
            if told and begun is None:
                begun = number
            for page, first, last in told[count:]:
                assert first < last <= num_layers and last - first <= windows
                new = {(layer, page) for layer in range(first, last)}
                assert not new & asked
                asked |= new
            if begun is None:
                assert number < cold + max(1, min(task, num_pages // 2, distance // 2))
                continue
            layer, page = divmod(number, num_pages)
            assert begun >= cold and (layer, page) in asked
            waiting = [one for one in asked if one[0] * num_pages + one[1] > number]
            # what may be ahead, and what windows have of later layers
            assert len(waiting) <= distance + num_pages * (windows - 1)
        assert told == sorted(told, key=lambda one: one[1] * num_pages + one[0])
        prefetch.close()


def test_layers_ask_for_about_as_much_as_each_other() -> None:
    """But for the first, which begins all files."""
    asked = [0] * 30
    spec = PageSpec(num_layers=30, num_kv_heads=1, page_size=16, head_dim=32, dtype="float32")

    def tell(page: int, first: int, last: int) -> None:
        asked[first] += last - first

    prefetch = DiskPrefetch(AtOnce(), lambda *_: False, tell, 320, spec)  # type: ignore[arg-type]
    for number in range(320 * 30):
        prefetch.reach(number)
    assert sum(asked) == 320 * 30 and max(asked[1:]) < 1.1 * 320


@pytest.mark.parametrize("is_told", [True, False])
def test_the_system_brings_what_comes_next_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """By files that its memory does not hold when they are opened. Where it is not told, it brings what is read."""
    spec = PageSpec(num_layers=16, num_kv_heads=2, page_size=64, head_dim=64, dtype="float32")  # 32 KiB of a head
    monkeypatch.setattr(disk_prefetch, "REQUEST_BYTES", 2 * 32 * 1024)
    monkeypatch.setattr(disk_prefetch, "LEAST_BYTES", 0)
    if not is_told:
        monkeypatch.setattr(DiskPrefetch, "reach", lambda *_: None)
    make_array(tmp_path, spec, 8)
    pool = DiskPool(spec, tmp_path, 8, DiskShare.of_all(spec))
    pages = [random_page(spec, slot) for slot in range(8)]
    for slot, page in enumerate(pages):
        pool.store(slot, page)
    files = [pool.chunk_path(slot, head) for slot in range(8) for head in range(2)]
    for file in files:
        forget(file)

    def held(layer: int) -> int:
        return sum(is_held(file, layer * 2**15) for file in files)

    if held(0):
        pytest.skip("this file system forgets no files, or does not say so")
    with pool.open(range(8)) as opened:
        out = torch.empty(spec.slice_shape)
        for layer in range(5):
            for index in range(8):
                opened.read(index, layer, pool.parts(out))
                assert same(out, pages[index][layer])
        deadline = time.monotonic() + 60
        while is_told and held(5) < 8:  # at least: a task may look at half a layer
            assert time.monotonic() < deadline, "the next layer was not brought"
            time.sleep(0.01)
        assert sum(map(held, range(8 if is_told else 5, 16))) == 0, "what is far away stays on disk"
    pool.close()


def test_what_goes_wrong_while_asking_is_raised_in_the_end() -> None:
    def tell(page: int, first: int, last: int) -> None:
        raise RuntimeError("no")

    spec = PageSpec(num_layers=2, num_kv_heads=1, page_size=16, head_dim=8, dtype="float32")
    with ThreadPoolExecutor(1) as thread:
        prefetch = DiskPrefetch(thread, lambda *_: False, tell, 3, spec)
        prefetch.reach(0)
        with pytest.raises(RuntimeError, match="no"):
            prefetch.close()


def test_a_task_that_runs_ends_when_the_reads_have() -> None:
    told: list[tuple[int, int, int]] = []

    class Late(Future[None]):
        def cancel(self) -> bool:
            self.set_result(self.work())
            return False

    class AtTheEnd:
        def submit(self, work: Any, *arguments: Any) -> Future[None]:
            task = Late()
            task.work = lambda: work(*arguments)
            return task

    spec = PageSpec(num_layers=2, num_kv_heads=1, page_size=16, head_dim=8, dtype="float32")
    prefetch = DiskPrefetch(AtTheEnd(), lambda *_: False, lambda *one: told.append(one), 3, spec)  # type: ignore[arg-type]
    prefetch.reach(0)
    prefetch.close()
    assert not told


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[DiskPool]:
    """Four pages, which the system has in its memory."""
    spec = PageSpec(num_layers=3, num_kv_heads=2, page_size=16, head_dim=8, dtype="float32")
    make_array(tmp_path, spec, 4)
    pool = DiskPool(spec, tmp_path, 4, DiskShare.of_all(spec))
    for slot in range(4):
        pool.store(slot, random_page(spec, slot))
    yield pool
    pool.close()


def read_all(pool: DiskPool) -> None:
    with pool.open(range(4)) as opened:
        out = torch.empty(pool.spec.slice_shape)
        for layer in range(3):
            for index in range(4):
                opened.read(index, layer, pool.parts(out))
                assert same(out, random_page(pool.spec, index)[layer])


@pytest.mark.parametrize("max_open", [0, 100])
def test_a_system_that_takes_no_advice_reads_as_it_does(
    pool: DiskPool, monkeypatch: pytest.MonkeyPatch, max_open: int
) -> None:
    monkeypatch.setattr("distkv.storage.pools.open_pages.MAX_OPEN", max_open)
    refuse_fadvise(monkeypatch)
    before = os.listdir("/proc/self/fd")
    read_all(pool)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_nothing_is_asked_for_that_is_in_memory(pool: DiskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system does not say so at a read, as tmpfs and overlayfs do not."""
    asked: list[int] = []
    monkeypatch.setattr("distkv.storage.disk.page_cache.bring", lambda *one: asked.append(1))
    for _ in range(2):
        read_all(pool)
        assert not asked
        tell_nothing(monkeypatch)


def test_files_are_closed_whatever_goes_wrong(pool: DiskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: DiskPrefetch) -> None:
        raise RuntimeError("no")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(DiskPrefetch, "close", close)
    with pytest.raises(RuntimeError, match="no"):
        read_all(pool)
    assert len(os.listdir("/proc/self/fd")) == len(before)
