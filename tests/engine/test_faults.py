"""What the disk can do to a run: damaged, missing and slow files, a full disk, a kill. Never a wrong token."""

import errno
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from support.damage import damages, page_files
from support.disks import limit_disk
from support.llms import OPTIONS, PAGE_BYTES, idle_engine, tiered, tiered_options
from support.processes import kill, read_line, run_code, start_python
from support.prompts import random_prompt
from typer.testing import CliRunner

from distkv import LLM, CapacityError, ConfigError, SamplingParams, StoreError
from distkv.commands.main import app
from distkv.engine.repairs import MAX_REPAIRS
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.pools import disk_pool
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.open_pages import OpenPages

SMALL = (4, 6, 56)  # pages of device, host and disk
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return random_prompt(500, 2)


@pytest.fixture(scope="module")
def expected(folder: Path, prompt: list[int]) -> list[int]:
    with LLM(folder, host_kv_bytes=0, **OPTIONS) as llm:
        return llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture
def llm(folder: Path, tmp_path: Path) -> Iterator[LLM]:
    """A device of 4 pages, a host of 6, and the disk for the rest."""
    with tiered(folder, SMALL, tmp_path / "cache") as llm:
        yield llm
        idle_engine(llm).integrity_check()


def chunk_files(llm: LLM) -> list[Path]:
    assert llm.info.cache_dir is not None
    return page_files(Path(llm.info.cache_dir))


@damages
def test_damaged_pages_are_computed_again(
    llm: LLM, prompt: list[int], expected: list[int], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    engine = idle_engine(llm)
    execute, damaged = engine._runner.executor.forward, 0
    steps = iter(range(1, len(expected) + 100))  # of decode, after the answer's token of that number

    def spy(plan, drawn):
        nonlocal damaged
        if [len(one.token_ids) for one in plan.sequences] == [1] and (number := next(steps)) in (1, 8, 21):
            for file in chunk_files(llm)[(number - 1) % 5 :: 6]:
                damage(file)
                damaged += 1
        return execute(plan, drawn)

    engine._runner.executor.forward = spy
    assert llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert damaged >= 9
    assert 9 <= llm.stats().pages_recomputed <= damaged
    assert any("c." in record.message for record in caplog.records), "the file is named"


def test_a_damaged_page_while_a_prompt_is_read(
    llm: LLM, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a prompt stream their prefix too."""
    read, calls = OpenPages.read, iter(range(10**9))

    def flaky(self: OpenPages, index: int, layer: int, parts: Any) -> None:
        if next(calls) in (3, 40, 41, 42, 160):
            raise StoreError(f"page {index} is gone")
        read(self, index, layer, parts)

    monkeypatch.setattr(OpenPages, "read", flaky)
    assert llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert llm.stats().pages_recomputed >= 3


def test_only_the_request_that_cannot_go_on_fails(llm: LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives nothing back: the long request fails with the page and the cause, the short one does not."""

    def broken(self: OpenPages, index: int, layer: int, parts: Any) -> None:
        raise StoreError("input/output error")

    with LLM(llm.config.model, host_kv_bytes=0, **OPTIONS) as alone:
        short = alone.generate([prompt[:20]], PARAMS, use_tqdm=False)[0]
    monkeypatch.setattr(OpenPages, "read", broken)
    long_one, short_one = llm.generate([prompt, prompt[:20]], PARAMS, use_tqdm=False)
    assert isinstance(long_one.error, StoreError)
    assert f"lost {MAX_REPAIRS + 1} times" in str(long_one.error) and "input/output error" in str(long_one.error)
    assert "KV page" in str(long_one.error)
    assert long_one.finished and long_one.outputs[0].finish_reason == "error"
    assert short_one.error is None and short_one.outputs[0].token_ids == short.outputs[0].token_ids
    with pytest.raises(StoreError, match="input/output error"), closing(llm.stream(prompt, PARAMS)) as outputs:
        list(outputs)
    monkeypatch.undo()
    assert llm.generate([prompt], PARAMS, use_tqdm=False)[0].error is None


def test_slow_reads_and_writes_are_waited_for(
    llm: LLM, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, store = OpenPages.read, DiskPool.store
    slow = iter(range(10**9))

    def slow_read(self: OpenPages, index: int, layer: int, parts: Any) -> None:
        if next(slow) == 50:
            time.sleep(1)
        read(self, index, layer, parts)

    def slow_store(self: DiskPool, slot: int, page: Any) -> None:
        time.sleep(0.05)
        store(self, slot, page)

    monkeypatch.setattr(OpenPages, "read", slow_read)
    monkeypatch.setattr(DiskPool, "store", slow_store)
    assert llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert llm.stats().pages_recomputed == 0 and llm.stats().bytes_moved["disk_streamed"]


def test_a_full_disk(
    llm: LLM, folder: Path, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes 9 pages of 2 heads and not one more: what fits is answered, what does not is refused with the
    sizes."""
    limit_disk(monkeypatch, 18)
    failed = llm.generate([prompt], PARAMS, use_tqdm=False)[0]
    assert isinstance(failed.error, CapacityError)
    assert "No space left on device" in str(failed.error)
    with LLM(folder, host_kv_bytes=0, **OPTIONS) as alone:
        fits = alone.generate([prompt[:200]], PARAMS, use_tqdm=False)[0]
    again = llm.generate([prompt[:200]], PARAMS, use_tqdm=False)[0]
    assert again.error is None and again.outputs[0].token_ids == fits.outputs[0].token_ids
    assert llm.stats().bytes_moved["host_to_disk"] <= 30 * PAGE_BYTES
    monkeypatch.undo()  # there is room again
    assert llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_idle_pages_on_a_full_disk_stand_in_nobodys_way(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 56 slots the disk has room for 9: requests that fill all tiers together with that run one after another, each
    in the room of what the one before has left there."""
    limit_disk(monkeypatch, 18)
    with LLM(folder, host_kv_bytes=0, **OPTIONS) as alone:
        for number in range(4):
            prompt = random_prompt(19 * 16 - PARAMS.max_tokens, 10 + number)
            output = llm.generate([prompt], PARAMS, use_tqdm=False)[0]
            assert output.error is None
            assert output.outputs == alone.generate([prompt], PARAMS, use_tqdm=False)[0].outputs
            assert llm.stats().pages_recomputed == 0
            files = chunk_files(llm)
            assert len(files) == 18, "as much as fits"
    again = llm.generate([prompt], PARAMS, use_tqdm=False)[0]
    assert again.num_cached_tokens_by_tier["disk"] > 0, "what was used last is there"


@pytest.mark.parametrize("recovers", [True, False])
def test_a_catalogue_that_cannot_be_written_for_a_while(
    folder: Path,
    tmp_path: Path,
    prompt: list[int],
    expected: list[int],
    recovers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is listed then is written later. If that never happens the catalogue lists slots whose pages have given way
    to others, all of them here, and the next process finds out when it reads them."""
    other = random_prompt(700, 3)
    with tiered(folder, SMALL, tmp_path) as llm:
        assert llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
        cache = Path(idle_engine(llm).info.cache_dir or "")

        def refuse(*_: Any) -> None:
            raise StoreError("the catalogue cannot be written: database or disk is full")

        monkeypatch.setattr(Catalogue, "update", refuse)
        assert llm.generate([other], PARAMS, use_tqdm=False)[0].error is None
        if recovers:
            monkeypatch.undo()
    monkeypatch.undo()
    verdict = CliRunner().invoke(app, ["cache", "verify", "--cache-dir", str(tmp_path)])
    assert verdict.exit_code == (not recovers), verdict.output
    with tiered(folder, SMALL, tmp_path) as llm:
        output = llm.generate([prompt], PARAMS, use_tqdm=False)[0]
        assert output.outputs[0].token_ids == expected
        assert bool(llm.stats().pages_recomputed) == (not recovers)
    CliRunner().invoke(app, ["cache", "verify", "--repair", "--cache-dir", str(tmp_path)])
    assert check_catalogue(cache) > 10


def test_a_disk_that_has_become_read_only(
    llm: LLM, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the catalogue nor its removal succeeds, nor any write of a page; what fits above the disk is answered."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse_update(*arguments: Any) -> None:
        raise StoreError("the catalogue of the disk tier cannot be written: attempt to write a readonly database")

    short = prompt[:60]
    with LLM(llm.config.model, host_kv_bytes=0, **OPTIONS) as alone:
        fits = alone.generate([short], PARAMS, use_tqdm=False)[0]
    monkeypatch.setattr(Catalogue, "update", refuse_update)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(disk_pool, "replace_file", refuse)
    for _ in range(3):
        again = llm.generate([short], PARAMS, use_tqdm=False)[0]
        assert again.error is None and again.outputs[0].token_ids == fits.outputs[0].token_ids
    assert isinstance(llm.generate([prompt], PARAMS, use_tqdm=False)[0].error, CapacityError)
    monkeypatch.undo()


@pytest.mark.parametrize("policy", ["write_through", "idle"])
def test_an_exit_without_close_saves_the_cache(folder: Path, tmp_path: Path, prompt: list[int], policy: str) -> None:
    code = (
        "from distkv import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, **{tiered_options(SMALL, tmp_path, disk_write_policy=policy)})\n"
        f"llm.generate([{prompt[:200]}], {PARAMS}, use_tqdm=False)\n"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    with tiered(folder, SMALL, tmp_path) as llm:
        output = llm.generate([prompt[:200]], PARAMS, use_tqdm=False)[0]
        assert output.num_cached_tokens_by_tier == {"device": 0, "host": 0, "disk": 192}


def test_too_long_a_request_is_refused_with_the_sizes_of_the_tiers(llm: LLM) -> None:
    with pytest.raises(CapacityError, match=r"device 4, host 6, disk 56.*disk_kv_bytes"):
        llm.generate([[5] * 1500], PARAMS, use_tqdm=False)


def test_a_folder_in_use_is_refused(llm: LLM, folder: Path) -> None:
    assert llm.info.cache_dir is not None
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*name another folder"):
        tiered(folder, SMALL, Path(llm.info.cache_dir).parent)


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_any_moment(folder: Path, tmp_path: Path, prompt: list[int], expected: list[int], rounds: int) -> None:
    """After each kill -9 every page that the catalogue lists is whole, and the next process goes on from them; also
    where the disk is so small that pages give way all the time."""
    rng = random.Random(rounds)
    cache = tmp_path / "cache"
    code = (
        "import json, random, sys\n"
        "from distkv import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, **json.loads(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        f"prompt, rng = {prompt}, random.Random(int(sys.argv[2]))\n"
        "while True:\n"
        "    cut = rng.randrange(200, 500)\n"
        f"    llm.generate([prompt[:cut] + [rng.randrange(3, 128)] * 40], {PARAMS}, use_tqdm=False)\n"
        "    print('answered', flush=True)\n"
    )
    listed = []
    for number in range(rounds):
        policy = rng.choice(["write_through", "idle"])
        options = tiered_options((4, 6, rng.choice([36, 56])), cache, disk_write_policy=policy)
        process = start_python(code, json.dumps(options), number)
        assert read_line(process) == "ready"
        if rng.random() < 0.7:
            assert read_line(process) == "answered"
        time.sleep(rng.random())
        assert process.poll() is None
        kill(process)
        [model] = cache.iterdir()
        listed.append(check_catalogue(model))
    assert listed[-1] > 10 and (rounds < 50 or len(set(listed)) > 1)
    stale = model / "kv.zarr" / "c.1.0.0.0.0.deadbeef.partial"
    stale.write_bytes(b"half a page")
    with tiered(folder, SMALL, cache) as llm:
        assert not stale.exists()
        output = llm.generate([prompt], PARAMS, use_tqdm=False)[0]
        assert output.outputs[0].token_ids == expected
        assert output.num_cached_tokens_by_tier["disk"] >= 190
    assert check_catalogue(model) > 10


def check_catalogue(cache: Path) -> int:
    """The pages that the catalogue lists, each compared with what a plain reader finds in the array."""
    catalogue = Catalogue(cache)
    entries = catalogue.entries()
    catalogue.close()
    array = zarr.open_array(str(cache / "kv.zarr"), mode="r")
    for entry in entries:
        heads = np.ascontiguousarray(np.moveaxis(array[entry.slot], 2, 0))
        checksums = np.frombuffer(entry.crc32c, dtype=np.uint32)
        assert [crc32c(layer.tobytes()) for head in heads for layer in head] == checksums.tolist()
    return len(entries)
