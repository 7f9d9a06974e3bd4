"""A cache folder outlives its engine: whoever opens it next, with however many ranks and slots, finds each page that
the catalogue lists, and nothing else is taken for one."""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import edit_config, save_llama
from support.damage import flip_bit
from support.disks import share
from support.llms import PAGE_BYTES, tiered_options
from support.pages import bits, random_page, same
from support.ranks import load_rank
from torch import Tensor
from typer.testing import CliRunner

from distkv import LLM, SamplingParams
from distkv.commands.main import app
from distkv.config import EngineConfig
from distkv.errors import ConfigError, DistKVError, StoreError
from distkv.kernels.codec_format import FORMATS
from distkv.kernels.cpu_kernels import CPU_KERNELS
from distkv.launch.fingerprint import make_fingerprint
from distkv.launch.launch import cache_place, launch
from distkv.planner.ranks import make_rank_config
from distkv.storage.device import CpuDevice
from distkv.storage.disk.cache_folder import (
    CATALOGUE,
    DESCRIPTION,
    SCRATCH,
    DamagedError,
    Description,
    FolderLock,
    describe,
)
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.disk.disk_array import OtherPagesError, find_slots, make_array
from distkv.storage.disk.page_arrays import ARRAY
from distkv.storage.disk.reopen import reopen
from distkv.storage.dtypes import torch_dtype
from distkv.storage.page_spec import DISK_CODECS, PageSpec
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.tier import Tier, Transfer
from distkv.workers.cache_place import CachePlace, free_bytes
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.group.report import Report, ReportCollector
from distkv.workers.group.step_plan import StepPlan, decode, encode
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.model.layout import Layout
from distkv.workers.model.llama import load_llama
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard
from distkv.workers.model.weight_files import DIGESTS, WeightFile
from distkv.workers.model.weights import DummySource, SafetensorsSource
from distkv.workers.rank import Loaded
from distkv.workers.sizes import PoolSizes

CPU = torch.device("cpu")
SPEC = PageSpec(num_layers=3, num_kv_heads=3, page_size=16, head_dim=4, dtype="bfloat16")
NUM_PAGES = 6
FINGERPRINT = "0123456789abcdef" * 4


def model(**changes: Any) -> ModelConfig:
    """3 KV heads of 3 query heads each."""
    raw = {
        "vocab_size": 64, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 9, "num_key_value_heads": 3, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return ModelConfig.from_dict(raw | changes)


def description(fingerprint: str = FINGERPRINT) -> Description:
    spec = SPEC
    return Description(
        fingerprint, "/models/one", "bfloat16", spec.page_size, spec.num_layers, spec.num_kv_heads, spec.head_dim,
        spec.page_bytes, kernels="native amx" if fingerprint == FINGERPRINT else "",
    )  # fmt: skip


def rank_pools(
    folder: Path, size: int, num_pages: int = NUM_PAGES, spec: PageSpec = SPEC
) -> list[tuple[range, DiskPool]]:
    """The pools of all ranks of a group on one node, with the heads that each holds."""
    pools = []
    for shard in (Shard.of(model(), Layout(size), rank) for rank in range(size)):
        first = shard.holder == 0
        own = replace(spec, num_kv_heads=shard.num_kv_heads)
        heads = share(own, shard.kv_heads[0], spec.num_kv_heads, reports=first, writes=first, is_first=not shard.rank)
        pools.append((range(*shard.kv_heads), DiskPool(own, folder, num_pages, heads)))
    return pools


def heads_of(page: Tensor, held: range) -> Tensor:
    return page[:, :, held.start : held.stop].contiguous()


def store(folder: Path, size: int, slot: int, page: Tensor, num_pages: int = NUM_PAGES, spec: PageSpec = SPEC) -> bytes:
    """A group of ranks writes a page, the last rank first; returns the checksums of the whole model."""
    pools = rank_pools(folder, size, num_pages, spec)
    for held, pool in reversed(pools):
        pool.store(slot, heads_of(page, held))
    return b"".join(pool.checksums(slot) for _, pool in pools)


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / ARRAY).iterdir()} - {"zarr.json"}


def chunks(*slots: int) -> set[str]:
    return {f"c.{slot}.0.0.{head}.0.0" for slot in slots for head in range(SPEC.num_kv_heads)}


def load(pool: DiskPool, slot: int, held: range) -> Tensor:
    page = torch.empty((SPEC.num_layers, 2, len(held), SPEC.page_size, SPEC.head_dim), dtype=torch_dtype(SPEC.dtype))
    pool.load(slot, page)
    return page


# --- what is said of other folders ---


def test_pages_that_other_numbers_of_ranks_share_out_are_told_of_once(tmp_path: Path, caplog: Any) -> None:
    """Not those of other models, nor what is no description; and a folder that is there has its own pages."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / DESCRIPTION).write_text("{")
    one, two = description(), msgspec.structs.replace(description(), fingerprint="f", decode_context_parallel_size=2)
    other = msgspec.structs.replace(two, model="/models/two")
    for name, pages in (("a", one), ("b", other), ("d", msgspec.structs.replace(one, page_size=64))):
        (tmp_path / name).mkdir()
        describe(tmp_path / name, pages)
    assert not caplog.records
    (tmp_path / "e").mkdir()
    for _ in range(2):
        describe(tmp_path / "e", two)
    (line,) = caplog.messages
    assert (
        f"{tmp_path / 'a'} are not used: they were written with decode_context_parallel_size 1 and page_size 16" in line
    )


# --- what ranks find of what others wrote ---


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("codec", DISK_CODECS)
def test_pages_do_not_depend_on_the_number_of_ranks(tmp_path: Path, codec: str, writers: int, readers: int) -> None:
    spec = replace(SPEC, disk_codec=codec)
    make_array(tmp_path, spec, NUM_PAGES)
    pages = {slot: random_page(spec, slot) for slot in (4, 0)}
    checksums = {slot: store(tmp_path, writers, slot, page, spec=spec) for slot, page in pages.items()}
    assert files(tmp_path) == chunks(0, 4), "one file per head, whoever holds it"
    for held, pool in rank_pools(tmp_path, readers, spec=spec):
        assert pool.adopt(checksums) == []
        for slot, page in pages.items():
            assert same(load(pool, slot, held), heads_of(page, held))
    array = zarr.open(tmp_path / ARRAY, mode="r")
    assert isinstance(array, zarr.Array) and array.shape == (NUM_PAGES, *SPEC.page_shape)
    assert np.asarray(array[4]).tobytes() == bits(pages[4]).tobytes()


def test_a_rank_that_shares_its_heads_checks_what_the_other_wrote(tmp_path: Path) -> None:
    """It reads what it stored right away, and notices damage."""
    make_array(tmp_path, SPEC, NUM_PAGES)
    page = random_page(SPEC, 0)
    (held, first), (also_held, second), *_ = rank_pools(tmp_path, 5)
    assert held == also_held == range(1)
    second.store(0, heads_of(page, held))
    assert files(tmp_path) == set() and second.checksums(0) == b""
    first.store(0, heads_of(page, held))
    assert same(load(second, 0, held), heads_of(page, held))
    flip_bit(first.chunk_path(0, 0))
    with pytest.raises(StoreError, match="the checksum of layer 1 is wrong"):
        load(second, 0, held)


def test_ranks_on_one_disk_and_on_others(tmp_path: Path) -> None:
    """2 heads on 4 ranks, of which 0 and 2 share a disk, and 1 and 3 another: the first one there locks the folder, and
    the first there that has a head writes it. Other engines are refused on both, and what they left means nothing on
    the disk where no catalogue is."""
    own = replace(SPEC, num_kv_heads=1)
    place = CachePlace(Path(), FINGERPRINT)
    folders = [tmp_path / "one", tmp_path / "other"]
    for kept in (description(), None):
        for folder in folders:
            folder.mkdir(exist_ok=True)
            Catalogue(folder).close()
            (folder / "writer.0123.0").touch()  # of an engine that was killed
        make_array(folders[1], SPEC, NUM_PAGES + 2)
        (folders[1] / CATALOGUE).touch()
        ranks = []
        for rank, head in enumerate((0, 0, 1, 1)):
            there = replace(place, folder=folders[rank % 2])
            tier = DiskTier(there, share(own, head, 3, reports=rank in (0, 2)), rank, kept)
            ranks.append(KVPools(own, PoolSizes(host=1, disk=NUM_PAGES), CpuDevice(), tier))
            with pytest.raises(ConfigError, match="in use by process"):
                KVPools(own, PoolSizes(host=1, disk=NUM_PAGES), CpuDevice(), replace(tier, place=another(there)))
            assert find_slots(there.folder, SPEC) == NUM_PAGES
        assert not (folders[1] / CATALOGUE).exists()
        third = replace(place, folder=folders[1])
        more = KVPools(own, PoolSizes(host=1, disk=NUM_PAGES), CpuDevice(), DiskTier(third, share(own, 1, 3), 4, kept))
        ranks.append(more)
        for rank, tiers in enumerate(ranks):
            assert tiers.disk is not None
            tiers.disk.store(rank, random_page(own, 0))
        assert files(folders[0]) == {"c.0.0.0.0.0.0", "c.2.0.0.1.0.0"}
        assert files(folders[1]) == {"c.1.0.0.0.0.0", "c.3.0.0.1.0.0"}, "the last has a head that another writes there"
        for tiers in reversed(ranks):
            tiers.close()
        for folder in folders:
            assert (folder / ARRAY).exists() == bool(kept) and not list(folder.glob("writer.*"))
            FolderLock(folder).release()


def another(place: CachePlace) -> CachePlace:
    """The same place, for another engine."""
    return replace(place, engine="another")


# --- adoption ---


def test_adoption_sweeps_what_is_not_listed(tmp_path: Path) -> None:
    make_array(tmp_path, SPEC, NUM_PAGES)
    page = random_page(SPEC, 0)
    checksums = {slot: store(tmp_path, 1, slot, page) for slot in range(3)}
    array = tmp_path / ARRAY
    partials = ["c.1.0.0.2.0.0abc.partial", "zarr.0abc.partial", "c.9.0.0.0.0.0abc.partial"]
    for name in partials:
        (array / name).write_bytes(b"half a page")
    (array / "c.77.0.0.1.0.0").write_bytes(b"a slot beyond the end")
    (array / "note.txt").write_text("mine")
    for number, (_, pool) in enumerate(rank_pools(tmp_path, 2)):  # 2 + 1 heads; each sweeps its own
        assert pool.adopt({1: checksums[1]}) == []
        assert ("c.0.0.0.2.0.0" in files(tmp_path)) == (number == 0)
    assert files(tmp_path) == chunks(1) | {"note.txt"}
    ranks = rank_pools(tmp_path, 1)
    ranks[0][1].adopt({1: checksums[1]})
    assert same(load(ranks[0][1], 1, ranks[0][0]), page)
    with pytest.raises(StoreError, match="holds no page"):
        ranks[0][1].adopt({})
        load(ranks[0][1], 1, ranks[0][0])
    assert files(tmp_path) == {"note.txt"}


def test_ranks_that_do_not_write_sweep_nothing(tmp_path: Path) -> None:
    make_array(tmp_path, SPEC, NUM_PAGES)
    store(tmp_path, 1, 0, random_page(SPEC, 0))
    (_, first), (_, second), *_ = rank_pools(tmp_path, 5)
    assert second.adopt({}) == [] and files(tmp_path) == chunks(0)
    assert first.adopt({}) == [] and files(tmp_path) == chunks(0) - {"c.0.0.0.0.0.0"}


def test_adoption_finds_out_what_is_missing(tmp_path: Path) -> None:
    make_array(tmp_path, SPEC, NUM_PAGES)
    page = random_page(SPEC, 0)
    checksums = {slot: store(tmp_path, 1, slot, page) for slot in range(5)}
    array = tmp_path / ARRAY
    (array / "c.0.0.0.2.0.0").unlink()
    os.truncate(array / "c.1.0.0.1.0.0", 100)
    with open(array / "c.2.0.0.0.0.0", "ab") as file:
        file.write(b"more")
    checksums[3] = checksums[3][:-4]
    checksums[NUM_PAGES] = checksums[4]
    found = [pool.adopt(checksums) for _, pool in rank_pools(tmp_path, 3)]
    assert [sorted(slots) for slots in found] == [[2, 3, 6], [1, 3, 6], [0, 3, 6]]
    together = ReportCollector(3).add([Report(missing=slots) for slots in found])
    assert together.missing == [0, 1, 2, 3, 6]
    held, pool = rank_pools(tmp_path, 1)[0]
    assert sorted(pool.adopt(checksums)) == together.missing
    assert same(load(pool, 4, held), page)
    with pytest.raises(StoreError, match=r"slot 0 of .* holds no page"):
        load(pool, 0, held)


def test_a_step_plan_has_the_ranks_adopt(tmp_path: Path, tiny_model: Path) -> None:
    """A page written by one engine's rank is streamed by the next one's; None adopts nothing."""
    folder = tmp_path / FINGERPRINT[:16]
    place, sizes = CachePlace(folder, FINGERPRINT), PoolSizes(device=4, host=4, disk=4)
    rank = load_rank(tiny_model)
    rank.allocate(sizes, place)
    rank.execute(StepPlan([], [], [], synthetic_pages=[(0, 7)], transfers=[Transfer(0, Tier.DEVICE, 0, Tier.HOST, 1)]))
    rank.execute(StepPlan([], [], [], [Transfer(1, Tier.HOST, 1, Tier.DISK, 2)], await_ids=[0]))
    rank.execute(StepPlan([], [], [], await_ids=[0, 1]))
    report = rank.take_report()
    assert report.done == [0, 1] and report.missing == []
    page = rank.pools.host.page(1).clone()
    rank.close()
    assert files(folder) == {"c.2.0.0.0.0.0", "c.2.0.0.1.0.0"}
    FolderLock(folder).release()

    rank = load_rank(tiny_model)
    rank.allocate(sizes, place)
    plan = StepPlan([], [], [], adopt={2: report.checksums[1], 3: report.checksums[1]})
    assert decode(encode(plan)).adopt == plan.adopt
    rank.execute(decode(encode(plan)))
    assert rank.take_report().missing == [3] and rank.take_report().missing == []
    rank.execute(StepPlan([], [], [], [Transfer(0, Tier.DISK, 2, Tier.HOST, 0)], await_ids=[0]))
    assert rank.take_report().done == [0] and same(rank.pools.host.page(0), page)
    rank.execute(StepPlan([], [], [], adopt={}))
    assert files(folder) == set()
    rank.close()


# --- the catalogue ---


def page_entry(slot: int, index: int, parent: int | None, last_use: float, crc32c: bytes = b"") -> Entry:
    """The page of key `slot` behind that of key `parent`."""
    key = b"root" if parent is None else b"key %d" % parent
    return Entry(slot, b"key %d" % slot, key, b"t%d" % slot, crc32c, last_use, index)


def test_the_catalogue_keeps_what_pages_are(tmp_path: Path) -> None:
    first, second = page_entry(3, 0, None, 5.5, b"crc"), page_entry(1, 1, 3, 7.25)
    with closing(Catalogue(tmp_path)) as catalogue:
        catalogue.update([], [first, second])
        catalogue.update([], [], touched=[3, 99], now=8.0)
        assert catalogue.entries() == [second, first._replace(last_use=8.0)]
        catalogue.update([3], [first._replace(slot=4)], touched=[4], now=9.0)
        assert catalogue.entries()[-1] == first._replace(slot=4, last_use=9.0)
        with closing(Catalogue(tmp_path, read_only=True)) as beside:
            assert beside.entries() == catalogue.entries()
            with pytest.raises(StoreError, match="readonly"):
                beside.update([1], [])
        catalogue.update([], [page_entry(7, 0, None, 1.0)._replace(key=second.key)])  # a key is listed once
        assert catalogue.slots() == {4, 7}
    assert [path.name for path in tmp_path.iterdir()] == [CATALOGUE]


def test_pages_without_their_parent_are_left_out(tmp_path: Path) -> None:
    with closing(Catalogue(tmp_path)) as catalogue:
        whole = [page_entry(0, 0, None, 9.0), page_entry(1, 1, 0, 2.0)]
        orphans = [page_entry(2, 1, 77, 3.0), page_entry(3, 2, 2, 3.0), page_entry(4, 3, 1, 3.0)]
        catalogue.update([], whole + orphans)
        assert catalogue.entries() == whole[::-1]
        assert catalogue.slots() == {0, 1, 2, 3, 4}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=20))
def test_the_order_of_giving_up(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int]]) -> None:
    """Whatever is cut off in front, no page is left without its parent, and no page is older than one cut off, where a
    page counts as used when one that follows it is."""
    entries: list[Entry] = []
    for slot, (parent, last_use) in enumerate(drawn):
        before = entries[parent] if parent < len(entries) else None
        entries.append(page_entry(slot, before.index + 1 if before else 0, before and before.slot, float(last_use)))
    folder = tmp_path_factory.mktemp("catalogue")
    with closing(Catalogue(folder)) as catalogue:
        catalogue.update([], entries)
        found = catalogue.entries()
    assert sorted(found) == sorted(entries)
    used = {one.key: one.last_use for one in entries}
    for one in sorted(entries, key=lambda one: -one.index):
        if one.index:
            used[one.parent] = max(used[one.parent], used[one.key])
    order = [one.key for one in found]
    assert [used[key] for key in order] == sorted(used.values())
    assert all(order.index(one.key) < order.index(one.parent) for one in entries if one.index)


def test_a_catalogue_of_another_program(tmp_path: Path) -> None:
    (tmp_path / CATALOGUE).write_bytes(b"not a database, and long enough to be told from one" * 20)
    with pytest.raises(DamagedError, match="cannot be opened: file is not a database"):
        Catalogue(tmp_path)
    (tmp_path / CATALOGUE).unlink()

    with closing(sqlite3.connect(tmp_path / CATALOGUE)) as database:
        database.execute("CREATE TABLE pages (slot INTEGER PRIMARY KEY, crc32c BLOB NOT NULL)")
    for read_only in (False, True):
        with pytest.raises(DamagedError, match="is the catalogue of another version or program"):
            Catalogue(tmp_path, read_only)


# --- a folder that is opened again ---


def fill(folder: Path, num_pages: int, chains: list[list[int]]) -> dict[bytes, Tensor]:
    """Makes a kept folder with sequences of pages in the given slots, the last one used last; returns the pages by
    key."""
    folder.mkdir(exist_ok=True)
    reopen(folder, SPEC, num_pages, description())
    pages, entries = {}, []
    for now, slots in enumerate(chains):
        parent = None
        for index, slot in enumerate(slots):
            page = random_page(SPEC, 100 + slot)
            crc32c = store(folder, 1, slot, page, num_pages)
            entries.append(page_entry(slot, index, parent, float(now), crc32c))
            pages[entries[-1].key] = page
            parent = slot
    with closing(Catalogue(folder)) as catalogue:
        catalogue.update([], entries)
    return pages


def check_whole(folder: Path, pages: dict[bytes, Tensor], num_pages: int) -> dict[bytes, int]:
    """Every page that the catalogue lists is there and is itself; returns their slots by key."""
    with closing(Catalogue(folder)) as catalogue:
        entries = catalogue.entries()
    held, pool = rank_pools(folder, 1, num_pages)[0]
    kept = {name: (folder / ARRAY / name).read_bytes() for name in files(folder)}
    assert pool.adopt({one.slot: one.crc32c for one in entries}) == []
    for one in entries:
        assert same(load(pool, one.slot, held), pages[one.key])
    for name, content in kept.items():  # as it was before the sweep
        (folder / ARRAY / name).write_bytes(content)
    return {one.key: one.slot for one in entries}


def test_the_same_number_of_slots_changes_nothing(tmp_path: Path) -> None:
    pages = fill(tmp_path, NUM_PAGES, [[3, 0], [5]])
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    reopen(tmp_path, SPEC, NUM_PAGES, description())
    after = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert check_whole(tmp_path, pages, NUM_PAGES).keys() == pages.keys()
    assert json.loads((tmp_path / DESCRIPTION).read_text())["model"] == "/models/one"


def test_more_slots_leave_all_pages_where_they_are(tmp_path: Path) -> None:
    pages = fill(tmp_path, NUM_PAGES, [[3, 0], [5]])
    reopen(tmp_path, SPEC, 10 * NUM_PAGES, description())
    assert find_slots(tmp_path, SPEC) == 10 * NUM_PAGES
    assert check_whole(tmp_path, pages, 10 * NUM_PAGES) == {b"key 3": 3, b"key 0": 0, b"key 5": 5}
    store(tmp_path, 2, 10 * NUM_PAGES - 1, random_page(SPEC, 0), 10 * NUM_PAGES)
    array = zarr.open(tmp_path / ARRAY, mode="r")
    assert isinstance(array, zarr.Array) and np.asarray(array[3]).tobytes() == bits(pages[b"key 3"]).tobytes()


@pytest.mark.parametrize(
    "num_pages, expected",
    [(6, [11, 1, 7, 9, 0, 10]), (4, [9, 7, 0, 10]), (3, [7, 0, 10]), (2, [0, 10]), (1, [0])],
)
def test_fewer_slots_keep_the_pages_used_last(tmp_path: Path, num_pages: int, expected: list[int]) -> None:
    """Chains 11 - 1 (old), 9 - 7 and 0 - 10 (new)."""
    chains = [[11, 1], [7, 9], [0, 10]]
    pages = fill(tmp_path, 12, chains)
    reopen(tmp_path, SPEC, num_pages, description())
    assert find_slots(tmp_path, SPEC) == num_pages
    slots = check_whole(tmp_path, pages, num_pages)
    assert slots.keys() == {b"key %d" % key for key in expected}
    assert set(slots.values()) <= set(range(num_pages))
    assert all(slots[b"key %d" % key] == key for key in expected if key < num_pages), "what fits stays"


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[int]:
    """The number-th change of the folder does not happen, and nothing after it; counts the changes."""
    calls = count()

    def patch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def change(*arguments: Any, **options: Any) -> Any:
            if next(calls) >= number:
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, change)

    for owner, name in ((os, "link"), (os, "unlink"), (os, "replace"), (Catalogue, "update")):
        patch(owner, name)
    return calls


def test_a_kill_while_pages_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step: the pages that the catalogue lists are whole, in the old number of slots and in any other."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of which there are many, and no power fails here
    original = tmp_path / "original"
    pages = fill(original, 12, [[11, 1], [7, 9], [0, 10]])
    kills = 0
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        try:
            with monkeypatch.context() as patch:
                kill_at(patch, number)
                reopen(folder, SPEC, 4, description())
        except Killed:
            kills += 1
            slots = find_slots(folder, SPEC)
            listed = check_whole(folder, pages, slots)
            assert {b"key 7", b"key 9", b"key 0", b"key 10"} <= listed.keys()
            for again in (4, 12, 3, 20):
                copy = tmp_path / f"{number} {again}"
                shutil.copytree(folder, copy)
                reopen(copy, SPEC, again, description())
                kept = check_whole(copy, pages, again)
                assert kept.keys() == listed.keys() if again >= 12 else len(kept) == again
                shutil.rmtree(copy)
        else:
            assert check_whole(folder, pages, 4).keys() == {b"key 7", b"key 9", b"key 0", b"key 10"}
            break
        shutil.rmtree(folder)
    assert kills > 3 * SPEC.num_kv_heads, "links, a transaction, unlinks, the metadata"


def test_a_missing_file_is_not_moved(tmp_path: Path) -> None:
    fill(tmp_path, 12, [[11, 1], [7, 9], [0, 10]])
    (tmp_path / ARRAY / "c.10.0.0.1.0.0").unlink()
    reopen(tmp_path, SPEC, 2, description())
    with closing(Catalogue(tmp_path)) as catalogue:
        slots = {one.key: one.slot for one in catalogue.entries()}
        checksums = {one.slot: one.crc32c for one in catalogue.entries()}
    assert rank_pools(tmp_path, 1, 2)[0][1].adopt(checksums) == [slots[b"key 10"]]


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    fill(tmp_path, 12, [[11, 1], [7, 9], [0, 10]])
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match=r"cannot be moved to fewer slots \(Operation not permitted\); leave"):
        reopen(tmp_path, SPEC, 4, description())
    reopen(tmp_path, SPEC, 12, description())


def test_metadata_that_are_lost_are_made_again(tmp_path: Path) -> None:
    """So are those of an array that was killed while it was made; not beside what distkv did not write."""
    fill(tmp_path, NUM_PAGES, [[3, 0]])
    (tmp_path / ARRAY / "zarr.json").unlink()
    reopen(tmp_path, SPEC, NUM_PAGES, description())
    assert files(tmp_path) == chunks(3, 0) and find_slots(tmp_path, SPEC) == NUM_PAGES
    with closing(Catalogue(tmp_path)) as catalogue:
        assert {one.slot for one in catalogue.entries()} == {3, 0}
    (tmp_path / ARRAY / "zarr.json").unlink()
    (tmp_path / ARRAY / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="was not made by distkv"):
        reopen(tmp_path, SPEC, NUM_PAGES, description())


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, page_size=32), replace(SPEC, num_layers=2), replace(SPEC, num_kv_heads=2),
        replace(SPEC, dtype="float16"), replace(SPEC, dtype="float32"),
    ],
)  # fmt: skip
def test_an_array_of_other_pages_is_given_up(tmp_path: Path, other: PageSpec, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing in it is taken for a page, not even where the sizes of the files are right."""
    fill(tmp_path, NUM_PAGES, [[3, 0]])
    reopen(tmp_path, other, 2, description())
    assert find_slots(tmp_path, other) == 2 and listed(tmp_path) == set()
    [warning] = caplog.messages
    assert "does not hold" in warning and "it is renamed to zarr.json.damaged and made again" in warning


def test_an_array_of_another_codec_is_one_of_other_pages(tmp_path: Path) -> None:
    """Codes of int8 and of fp8 take as many bytes."""
    int8 = replace(SPEC, head_dim=16, kv_cache_dtype="int8")
    make_array(tmp_path, int8, NUM_PAGES)
    assert find_slots(tmp_path, int8) == NUM_PAGES
    with pytest.raises(OtherPagesError, match="does not hold fp8_e4m3 pages"):
        find_slots(tmp_path, replace(int8, kv_cache_dtype="fp8_e4m3"))


def test_an_array_of_another_program_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, NUM_PAGES, [[3, 0]])
    zarr.create_array(tmp_path / ARRAY, shape=(4,), dtype="f4", overwrite=True)
    with pytest.raises(ConfigError, match=r"kv.zarr' was not made by distkv; name another cache_dir"):
        reopen(tmp_path, SPEC, 2, description())
    assert listed(tmp_path) == {0, 3}, "nothing was changed"


# --- fingerprints ---


def weights_digest(folder: Path) -> str:
    """Of the checkpoint as it is opened now."""
    with SafetensorsSource(folder) as source:
        return source.digest(whole=True)


def test_a_flipped_bit_of_a_weight_is_another_model(tiny_model: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        shutil.copytree(tiny_model, folder)
    assert weights_digest(one) == weights_digest(other), "the folder's name has no part in it"
    file = other / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    assert weights_digest(one) != weights_digest(other)


def test_shards_are_digested_in_order(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path, max_shard_size="60KB")
    digest = weights_digest(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 1 and list(json.loads((folder / DIGESTS).read_text())) == names
    last = folder / names[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_digest(folder) != digest
    last.unlink()


def test_the_digest_is_cached_until_a_file_changes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / DIGESTS).write_text("[1]")  # of whoever
    digest = weights_digest(folder)
    reads: list[Path] = []
    read = WeightFile.digest

    def counted(self: WeightFile) -> str:
        reads.append(self.path)
        return read(self)

    monkeypatch.setattr(WeightFile, "digest", counted)
    assert weights_digest(folder) == digest and reads == []
    os.utime(folder / "model.safetensors", ns=(0, 12345))
    assert weights_digest(folder) == digest and len(reads) == 1
    assert weights_digest(folder) == digest and len(reads) == 1
    (folder / DIGESTS).unlink()

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("distkv.workers.model.weight_files.replace_file", refuse)
    assert weights_digest(folder) == digest
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Read-only file system" in caplog.text


def test_what_a_fingerprint_is_of() -> None:
    base = make_fingerprint("weights", "native amx", model(), "bfloat16", 256)
    assert len(base) == 64 and base == make_fingerprint("weights", "native amx", model(), "bfloat16", 256)
    for same_pages in (model(eos_token_id=5), model(max_position_embeddings=77), model(torch_dtype="float32")):
        assert make_fingerprint("weights", "native amx", same_pages, "bfloat16", 256) == base
    others = [
        make_fingerprint("weights", "native avx2", model(), "bfloat16", 256),
        make_fingerprint("other", "native amx", model(), "bfloat16", 256),
        make_fingerprint("weights", "native amx", model(), "float16", 256),
        make_fingerprint("weights", "native amx", model(), "bfloat16", 128),
        make_fingerprint("weights", "native amx", model(), "bfloat16", 256, "auto", "lossless"),
        *(make_fingerprint("weights", "native amx", model(), "bfloat16", 256, codec) for codec in FORMATS),
        *(
            make_fingerprint("weights", "native amx", changed, "bfloat16", 256)
            for changed in (model(rope_theta=5e5), model(rms_norm_eps=1e-5), model(num_hidden_layers=2))
        ),
        *(
            make_fingerprint(weights.digest(whole=True), "native amx", model(), "bfloat16", 256)
            for weights in (DummySource(seed, torch.bfloat16, CPU) for seed in (0, 1))
        ),
    ]
    assert len({base, *others}) == 1 + len(others)


# --- engines ---


def options(cache_dir: Path, **changes: Any) -> dict[str, Any]:
    return tiered_options((4, 6, 36), cache_dir, max_num_seqs=2, **changes)


def test_the_folder_is_named_after_the_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with LLM(tiny_model, **options(cache)) as llm:
        info = llm.info
        assert len(info.fingerprint) == 64 and info.enable_prefix_caching and info.write_through
        assert info.cache_dir == str(cache / info.fingerprint[:16])
        with LLM(tiny_model, **options(cache, dtype="float16", disk_write_policy="idle")) as other:
            assert other.info.fingerprint != info.fingerprint and not other.info.write_through
        with pytest.raises(ConfigError, match="in use by process"):
            LLM(tiny_model, **options(cache))
        with LLM(tiny_model, **options(cache, enable_prefix_caching=False)) as scratch:
            assert (scratch.info.fingerprint, scratch.info.enable_prefix_caching) == ("", False)
            assert scratch.info.cache_dir == str(cache / SCRATCH)
            assert (cache / SCRATCH / ARRAY).exists()
    assert [path.name for path in (cache / SCRATCH).iterdir()] == ["lock"]
    assert find_slots(Path(info.cache_dir), PageSpec(2, 2, 16, 16, "float32")) == info.num_disk_pages
    described = json.loads((Path(info.cache_dir) / DESCRIPTION).read_text())
    assert described["fingerprint"] == info.fingerprint and described["model"] == str(tiny_model)
    assert described["page_bytes"] == info.page_bytes


def test_each_codec_has_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is found of what the other one has written, and both find their own; the answers are the same."""
    prompt, params = [list(range(5, 60))], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    found = []
    for codec in (*DISK_CODECS, *DISK_CODECS):
        with LLM(tiny_model, **options(tmp_path, disk_kv_codec=codec)) as llm:
            [output] = llm.generate(prompt, params, use_tqdm=False)
            folder = Path(llm.info.cache_dir or "")
        assert json.loads((folder / DESCRIPTION).read_text())["disk_codec"] == codec
        found.append((folder.name, output.num_cached_tokens_by_tier["disk"], output.outputs[0].token_ids))
    assert [one[1] for one in found] == [0, 0, 48, 48]
    assert len({one[0] for one in found}) == 2 and all(one[2] == found[0][2] for one in found)
    code, text = distkv("verify", "--cache-dir", str(tmp_path))
    assert code == 0 and "all whole" in text
    code, text = distkv("ls", "--cache-dir", str(tmp_path))
    assert "lossless" in text and "none" in text


def test_ranks_have_no_part_in_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig.load(tiny_model)

    def place(digest: str, **options: Any) -> tuple[bool, CachePlace | None]:
        engine = EngineConfig(tiny_model, **options)
        ranks = make_rank_config(engine, config, "cpu")
        return ranks.digest_weights, cache_place(engine, ranks, [Loaded(digest, "torch")] * engine.tensor_parallel_size)

    places = [place("weights", tensor_parallel_size=size, **options(tmp_path)) for size in (1, 4)]
    fingerprint = make_fingerprint("weights", "torch", config, "float32", 16)
    for digests, found in places:
        assert digests and found is not None
        assert (found.fingerprint, found.folder) == (fingerprint, tmp_path / fingerprint[:16])
    assert place("") == (False, None), "without a cache_dir, no weight is read twice"


def test_angles_that_depend_on_the_prompt_turn_prefix_caching_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = save_llama(tmp_path / "model")
    edit_config(folder, lambda raw: raw.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    with LLM(folder, **options(tmp_path / "cache")) as llm:
        assert not llm.info.enable_prefix_caching and llm.info.fingerprint == ""
        assert llm.info.cache_dir == str(tmp_path / "cache" / SCRATCH)
    assert [record.getMessage() for record in caplog.records if "dynamic" in record.getMessage()] == [
        "prefix caching is off: with rope_type 'dynamic' the keys of a token depend on the length of its prompt, so "
        "prompts that begin alike do not share pages"
    ]
    caplog.clear()
    with LLM(folder, **options(tmp_path / "cache", enable_prefix_caching=False)):
        assert "dynamic" not in caplog.text


def test_space_that_pages_take_is_free_for_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a size, an engine does not shrink the cache that it finds by the room that this takes."""
    config = EngineConfig(tiny_model, load_format="dummy", **options(tmp_path, disk_kv_bytes=None))
    engine = launch(config)
    before = engine.info.num_disk_pages
    engine.close()
    assert before > 1000
    assert engine.info.cache_dir is not None
    for slot in range(64):
        (Path(engine.info.cache_dir) / ARRAY / f"c.{slot}.0.0.0.0.0").write_bytes(bytes(PAGE_BYTES))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # others write meanwhile
    assert free_bytes(Path(engine.info.cache_dir)) - usage.free >= 60 * PAGE_BYTES


@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holders_of_a_head_agree_in_every_bit(tmp_path: Path, num_tokens: int, dtype: torch.dtype) -> None:
    """2 KV heads of 3 query heads on 5 ranks: 3 and 2 holders, which have 1 query head each or 2 and 1."""
    folder, _ = save_llama(tmp_path, num_attention_heads=6, hidden_size=96, attention_bias=True)
    config = ModelConfig.load(folder)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, config.hidden_size, generator=generator).to(dtype)
    whole = project(folder, Shard.of(config, Layout(), 0), dtype, hidden)
    by_head: dict[int, list[Tensor]] = {}
    for rank in range(5):
        shard = Shard.of(config, Layout(5), rank)
        kv = project(folder, shard, dtype, hidden)
        by_head.setdefault(shard.kv_heads[0], []).append(kv)
        torch.testing.assert_close(kv, whole[:, :, shard.kv_heads[0]].unsqueeze(2), rtol=0.02, atol=0.02)
    assert [len(held) for held in by_head.values()] == [3, 2]
    for first, *others in by_head.values():
        assert all(same(first, other) for other in others)


def project(folder: Path, shard: Shard, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    """Keys and values of tokens `[2, tokens, kv_head, head_dim]` as a rank writes them in the first layer."""
    from distkv.kernels.rope import rope_and_write_kv

    with SafetensorsSource(folder) as weights, torch.inference_mode():
        config = ModelConfig.load(folder)
        llama = load_llama(weights, config, shard, ProcessGroup(), dtype, torch.device("cpu"), CPU_KERNELS)
        num_tokens = len(hidden)
        positions = torch.arange(num_tokens)
        cos, sin = llama.rope.angles(positions, torch.full((num_tokens,), num_tokens))
        pool = torch.zeros(2, 1, shard.num_kv_heads, 64, config.head_dim, dtype=dtype)
        qkv = llama.layers[0].qkv(hidden).unflatten(1, (-1, config.head_dim))
        assert qkv.shape[1] == shard.num_query_heads + 2 * shard.num_kv_heads
        rope_and_write_kv(qkv, cos, sin, pool, torch.zeros(num_tokens, dtype=torch.long), positions)
        return pool[:, 0, :, :num_tokens].transpose(1, 2).contiguous()


# --- the command ---


def distkv(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *arguments])
    if isinstance(result.exception, DistKVError):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two models: one with chains 0 - 1 - 2 and 5 (last used at 0 and 1), one with 3 (at 0)."""
    fill(tmp_path / FINGERPRINT[:16], NUM_PAGES, [[0, 1, 2], [5]])
    other = tmp_path / "fedcba9876543210"
    other.mkdir()
    reopen(other, SPEC, NUM_PAGES, description(other.name * 4))
    crc32c = store(other, 1, 3, random_page(SPEC, 1))
    with closing(Catalogue(other)) as catalogue:
        catalogue.update([], [page_entry(3, 0, None, 0.5, crc32c)])
    (tmp_path / SCRATCH).mkdir()
    (tmp_path / "sessions").mkdir()
    return tmp_path


def listed(folder: Path) -> set[int]:
    with closing(Catalogue(folder)) as catalogue:
        return {one.slot for one in catalogue.entries()}


def test_cache_ls(cache: Path) -> None:
    lock = FolderLock(cache / FINGERPRINT[:16])  # an engine runs
    code, text = distkv("ls", "--cache-dir", str(cache))
    lock.release()
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "/models/one" in line]
    assert [row[:7] for row in rows] == [
        ["/models/one", FINGERPRINT[:16], "native amx", "none", "4", "2", "64"],
        ["/models/one", "fedcba9876543210", "?", "none", "1", "1", "16"],
    ]
    assert all("KiB" in row[7] and row[8].startswith("19") for row in rows)


def test_cache_verify(cache: Path) -> None:
    first, other = cache / FINGERPRINT[:16], cache / "fedcba9876543210"
    code, text = distkv("verify", "--cache-dir", str(cache))
    assert code == 0 and "5 pages read, all whole" in text
    flip_bit(first / ARRAY / "c.1.0.0.2.0.0")
    (other / ARRAY / "c.3.0.0.0.0.0").unlink()
    lock = FolderLock(first)
    code, text = distkv("verify", "--cache-dir", str(cache))
    assert code == 1 and "5 pages read" in text
    assert f"{first / ARRAY / 'c.1.0.0.2.0.0'} is damaged: the checksum of layer 1 is wrong" in text
    assert f"{other / ARRAY / 'c.3.0.0.0.0.0'} cannot be read: No such file or directory" in text
    assert listed(first) == {0, 1, 2, 5}
    with pytest.raises(ConfigError, match="in use by process"):
        distkv("verify", "--repair", "--cache-dir", str(cache))
    lock.release()
    code, text = distkv("verify", "--repair", "--cache-dir", str(cache))
    assert code == 1 and "2 pages taken out, 1 of them damaged" in text
    assert listed(first) == {0, 5} and files(first) == chunks(0, 5) and listed(other) == set()
    assert distkv("verify", "--cache-dir", str(cache))[0] == 0


def test_cache_prune(cache: Path) -> None:
    first, other = cache / FINGERPRINT[:16], cache / "fedcba9876543210"
    (first / ARRAY / "c.4.0.0.0.0.0").write_bytes(b"not listed")
    whole = 5 * SPEC.page_bytes + sum(path.stat().st_size for path in cache.rglob("zarr.json"))
    lock = FolderLock(other)
    with pytest.raises(ConfigError, match="in use by process"):
        distkv("prune", "--max-bytes", "1GiB", "--cache-dir", str(cache))
    lock.release()
    code, text = distkv("prune", "--max-bytes", "1GiB", "--cache-dir", str(cache))
    assert code == 0 and "0 pages given up" in text and files(first) == chunks(0, 1, 2, 5)
    size = SPEC.page_bytes
    distkv("prune", "--max-bytes", str(whole - size), "--cache-dir", str(cache))
    assert listed(first) == {0, 1, 5} and listed(other) == {3}, "the end of the oldest chain"
    code, text = distkv("prune", "--max-bytes", "0", "--model", "fedc", "--cache-dir", str(cache))
    assert code == 0 and listed(first) == {0, 1, 5} and listed(other) == set() and files(other) == set()
    assert "1 pages given up" in text
    distkv("prune", "--max-bytes", "0", "--cache-dir", str(cache))
    assert listed(first) == set() and files(first) == set()
    with pytest.raises(ConfigError, match="0 models have a fingerprint that begins with '77'; there are: 0123"):
        distkv("prune", "--max-bytes", "0", "--model", "77", "--cache-dir", str(cache))


def test_folders_that_are_no_cache(tmp_path: Path, cache: Path) -> None:
    empty = tmp_path / "sessions"
    assert "holds no KV pages" in distkv("ls", "--cache-dir", str(empty))[1]
    (empty / "thesis.txt").touch()
    refusals: list[tuple[Path, str]] = [
        (tmp_path / "none", "is no folder; name the cache_dir of an engine"),
        (empty, "is not a cache of KV pages; name the cache_dir of an engine"),
        (cache / FINGERPRINT[:16], "is one model's part of a cache; name the folder above it"),
    ]
    for folder, message in refusals:
        with pytest.raises(ConfigError, match=message):
            distkv("ls", "--cache-dir", str(folder))
    with pytest.raises(
        ConfigError,
        match="max-bytes is '10 apples'; give bytes as a positive whole number or a text such as 512MB or 4GiB, or 0",
    ):
        distkv("prune", "--max-bytes", "10 apples", "--cache-dir", str(cache))
