"""What the system is asked to bring from disk, when, and that it does."""

import ctypes
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.pages import random_page, same

from distkv.storage.disk.cache_folder import DiskHeads
from distkv.storage.disk.disk_array import make_array
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


@given(
    num_pages=st.integers(1, 40), num_layers=st.integers(1, 9), heads=st.integers(1, 3), ahead=st.integers(0, 12),
    window=st.integers(0, 8), task=st.integers(1, 7), cold=st.integers(0, 60),
)  # fmt: skip
def test_each_slice_is_asked_for_once_and_in_time(
    num_pages: int, num_layers: int, heads: int, ahead: int, window: int, task: int, cold: int
) -> None:
    """From about the first that is on disk alone, not much further ahead than memory may be filled, and in the order of
    the reads."""
    spec = PageSpec(num_layers=num_layers, num_kv_heads=heads, page_size=16, head_dim=8, dtype="float32")
    size = spec.slice_bytes_in(Tier.DISK)
    told: list[tuple[int, int, int]] = []
    total, distance = num_pages * num_layers, max(1, min(ahead, num_pages))
    windows = max(1, min(window, ahead // num_pages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_prefetch, "AHEAD_BYTES", ahead * size)
        patch.setattr(disk_prefetch, "WINDOW_BYTES", window * size // heads)
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
                assert number < cold + task or number + distance >= total - 1
                continue
            layer, page = divmod(number, num_pages)
            assert begun >= cold and (layer, page) in asked
            waiting = [one for one in asked if one[0] * num_pages + one[1] > number]
            # up to a layer ahead, and what windows have of later ones
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
    monkeypatch.setattr(disk_prefetch, "WINDOW_BYTES", 2 * 32 * 1024)
    if not is_told:
        monkeypatch.setattr(DiskPrefetch, "reach", lambda *_: None)
    make_array(tmp_path, spec, 8)
    pool = DiskPool(spec, tmp_path, 8, DiskHeads(0, 2))
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


def forget(file: Path) -> None:
    """Has the system write a file and drop it from its memory."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def is_held(file: Path, offset: int) -> bool:
    """Whether the system has the page around a byte of a file in its memory."""
    content = np.memmap(file, mode="c")  # private, so that its address is to be had
    found = ctypes.c_ubyte()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(content.ctypes.data + offset), ctypes.c_size_t(1), ctypes.byref(found)) == 0
    return bool(found.value & 1)


def test_what_goes_wrong_while_asking_is_raised_in_the_end() -> None:
    def tell(page: int, first: int, last: int) -> None:
        raise RuntimeError("no")

    spec = PageSpec(num_layers=2, num_kv_heads=1, page_size=16, head_dim=8, dtype="float32")
    with ThreadPoolExecutor(1) as thread:
        prefetch = DiskPrefetch(thread, lambda *_: False, tell, 3, spec)
        prefetch.reach(0)
        with pytest.raises(RuntimeError, match="no"):
            prefetch.close()
