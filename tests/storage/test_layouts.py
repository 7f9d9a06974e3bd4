"""One cache folder under several layouts of ranks: pages that one has written are read by all others."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from support.damage import flip_bit
from support.layouts import NUM_PAGES, SPEC, page_of, pages_of, shares, start
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.storage.disk.cache_folder import FolderLock, InUseError
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.disk.page_arrays import ARRAY, PageArray, find_arrays, find_pieces
from distkv.storage.errors import StoreError
from distkv.storage.page_spec import PageSpec
from distkv.workers.cache_place import CachePlace
from distkv.workers.disk_shares import join_checksums
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.sizes import PoolSizes

CODED = replace(SPEC, kv_cache_dtype="int8", head_dim=16)
LOSSLESS = replace(SPEC, disk_codec="lossless")


def files(folder: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in folder.glob("*.zarr/c.*")}


@pytest.mark.parametrize("spec", [SPEC, LOSSLESS, CODED], ids=["plain", "lossless", "codes"])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_every_layout_reads_the_pages_of_all_others(tmp_path: Path, spec: PageSpec, num_parts: int) -> None:
    """Until they are written again, where they go to arrays of their own and nothing is left of the old ones."""
    layouts = [shares(spec, stages, ranks, num_parts) for stages, ranks in ((1, 1), (2, 3), (4, 1), (1, 2), (3, 2))]
    pages: dict[int, Tensor] = {}
    entries: dict[int, bytes] = {}
    for number, layout in enumerate(layouts):
        ranks = start(tmp_path, layout, spec)
        assert ranks.adopt(entries) == set(pages)
        for slot, page in pages.items():
            ranks.read(slot, page)
        for slot in (number, number + 1):  # of which one was written by the layout before
            pages[slot] = page_of(spec, 10 * number + slot, num_parts)
            entries[slot] = ranks.write(slot, pages[slot])
            assert (
                len({name for name in files(tmp_path) if f"/c.{slot}." in name})
                == len({share.array for share in layout}) * spec.num_kv_heads * num_parts
            ), "one file for each stage, head and part"
        ranks.close()
    assert {*find_arrays(tmp_path, num_parts)} == {share.array for layout in layouts for share in layout}
    last = start(tmp_path, layouts[0], spec)
    del entries[0]
    assert last.adopt(entries) == set(entries) and not any("/c.0." in name for name in files(tmp_path))
    last.close()


def test_anybody_reads_the_arrays_of_stages(tmp_path: Path) -> None:
    ranks = start(tmp_path, shares(SPEC, 2, 1, 2))
    page = page_of(SPEC, 1, 2)
    ranks.write(3, page)
    ranks.close()
    tokens = torch.cat([*page.reshape(2, *SPEC.page_shape)], dim=3).numpy()  # parts one after another
    for name, layers in (("kv.layers-0-2.zarr", slice(0, 3)), ("kv.layers-3-5.zarr", slice(3, 6))):
        array: Any = zarr.open(tmp_path / name, mode="r")
        assert array.shape == (NUM_PAGES, 3, 2, 3, 32, 4) and array.attrs["layers"] == [layers.start, layers.stop]
        assert array[3].tobytes() == tokens[layers].tobytes()


def test_a_disk_with_a_part_of_the_layers_has_no_more(tmp_path: Path) -> None:
    """Ranks of other stages, with disks of their own, wrote the rest."""
    ranks = start(tmp_path, shares(SPEC, 2, 1)[:1])
    page = page_of(SPEC, 1)
    whole = start(tmp_path / "whole", shares(SPEC, 1, 1))
    checksums = whole.write(2, page)
    whole.close()
    ranks.pools[0].store(2, ranks.own(page, ranks.shares[0]))
    ranks.close()
    for stages, missing in ((1, [2]), (2, []), (3, [])):  # the first stage of three has fewer layers
        ranks = start(tmp_path, shares(SPEC, stages, 1)[:1])
        assert ranks.pools[0].adopt({2: checksums}) == missing
        ranks.close()


@pytest.mark.parametrize("swapped", [False, True])
def test_stages_with_disks_of_their_own(tmp_path: Path, swapped: bool) -> None:
    """Each locks its folder and has its layers alone. After a swap nothing is found, what lies there is removed, and
    the report says why."""
    having = shares(SPEC, 2, 1)
    place = CachePlace(Path(), "f")
    folders = [tmp_path / "one", tmp_path / "other"]
    page = page_of(SPEC, 1)

    def open_pools(folders: list[Path]) -> list[KVPools]:
        return [
            KVPools(
                replace(SPEC, num_layers=3), PoolSizes(host=1, disk=NUM_PAGES), CpuDevice(),
                DiskTier(replace(place, folder=folder), share, rank, pages_of(SPEC)),
            )
            for rank, (folder, share) in enumerate(zip(folders, having, strict=True))
        ]  # fmt: skip

    pools = open_pools(folders)
    for one, share in zip(pools, having, strict=True):
        assert one.disk is not None
        one.disk.store(2, page[slice(*share.layers)].contiguous())
    for folder in folders:
        with pytest.raises(InUseError):
            FolderLock(folder)
    checksums = join_checksums(having, [one.disk.checksums(2) for one in pools if one.disk is not None])
    for one in pools:
        one.close()
    assert [array.name for folder in folders for array in find_arrays(folder)] == [share.array.name for share in having]

    pools = open_pools(folders[::-1] if swapped else folders)
    reports = []
    for one in pools:
        one.adopt({2: checksums})
        reports.append(one.take_report())
    assert [report.missing for report in reports] == [[2] if swapped else []] * 2
    if swapped:
        assert (
            "layers 3 to 5 of KV heads 0 to 2 of 1 pages, such as kv.layers-3-5.zarr/c.2.0.0.0.0.0" in reports[1].lack
        )
        assert len(find_arrays(folders[0])) == len(find_arrays(folders[1])) == 1 and not files(folders[0])
    for one in pools:
        one.close()


def test_fewer_slots_move_the_pages_of_all_layouts(tmp_path: Path) -> None:
    one, two = shares(SPEC, 1, 1), shares(SPEC, 2, 1)
    pages = {slot: page_of(SPEC, slot) for slot in (6, 7)}
    entries = {}
    for slot, layout in ((6, one), (7, two)):
        ranks = start(tmp_path, layout)
        ranks.adopt(entries)
        entries[slot] = ranks.write(slot, pages[slot])
        ranks.close()
    with closing(Catalogue(tmp_path)) as catalogue:
        added = [Entry(slot, b"key %d" % slot, b"root", b"", entries[slot], float(slot), 0) for slot in pages]
        catalogue.update([], added)
    ranks = start(tmp_path, shares(SPEC, 3, 1), num_pages=3)
    with closing(Catalogue(tmp_path)) as catalogue:
        moved = {entry.slot: entry for entry in catalogue.entries()}
    assert ranks.adopt({slot: entry.crc32c for slot, entry in moved.items()}) == set(moved) == {0, 1}
    for slot, entry in moved.items():
        ranks.read(slot, pages[int(entry.key.split()[1])])
    ranks.close()


def test_damage_in_a_file_of_another_layout_is_found(tmp_path: Path) -> None:
    ranks = start(tmp_path, shares(SPEC, 2, 1))
    page = page_of(SPEC, 1)
    entries = {1: ranks.write(1, page)}
    ranks.close()
    flip_bit(tmp_path / "kv.layers-3-5.zarr" / "c.1.0.0.2.0.0")
    whole = start(tmp_path, shares(SPEC, 1, 1))
    assert whole.adopt(entries) == {1}
    with pytest.raises(StoreError, match=r"kv\.layers-3-5\.zarr/c\.1\.0\.0\.2\.0\.0 is damaged: the checksum of layer"):
        whole.read(1, page)
    whole.close()
    (tmp_path / "kv.layers-0-2.zarr" / "c.1.0.0.0.0.0").unlink()
    whole = start(tmp_path, shares(SPEC, 1, 1))
    assert whole.adopt(entries) == set()
    whole.close()


def test_pieces() -> None:
    arrays = [PageArray((0, 3)), PageArray((3, 6)), PageArray((2, 5)), PageArray()]

    def pieces(layers: tuple[int, int], *there: int) -> list[tuple[str, tuple[int, int]]] | None:
        found = find_pieces(layers, 6, [arrays[number] for number in there], lambda array: True)
        return None if found is None else [(piece.array.name, piece.layers) for piece in found]

    assert pieces((0, 6), 0, 1) == [("kv.layers-0-2.zarr", (0, 3)), ("kv.layers-3-5.zarr", (3, 6))]
    assert pieces((1, 4), 0, 2) == [("kv.layers-0-2.zarr", (1, 3)), ("kv.layers-2-4.zarr", (3, 4))]
    assert pieces((0, 6), 0, 2) is None and pieces((4, 6), 3, 1) == [(ARRAY, (4, 6))]
