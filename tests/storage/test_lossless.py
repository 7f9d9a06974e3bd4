"""`disk_kv_codec="lossless"`: every bit comes back, Zarr reads it too, and damage is found before it can do any."""

import os
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from crc32c import crc32c
from numcodecs import blosc
from support.disk_process import DiskProcess
from support.disks import description, disk_pool, listed
from support.pages import SPEC, bits, load, random_page, same
from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.disk.page_arrays import ARRAY, DiskShare
from distkv.storage.disk.reopen import rejoin, reopen
from distkv.storage.dtypes import DTYPES, torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.tier import Tier

WIDE = PageSpec(num_layers=2, num_kv_heads=1, page_size=256, head_dim=64, dtype="bfloat16", disk_codec="lossless")
SMALL = replace(SPEC, disk_codec="lossless")


def every_pattern(spec: PageSpec, seed: int | None) -> Tensor:
    """A page of all numbers of 16 bits; of 32 bits, of those that are special in any way. Shuffled by a seed."""
    count = spec.page_bytes // (2 if spec.dtype != "float32" else 4)
    if spec.dtype == "float32":
        exponents = np.arange(256, dtype=np.uint32) << 23
        mantissas = np.array([0, 1, 2, 0x400000, 0x400001, 0x7FFFFF, 0x2AAAAA, 0x155555], dtype=np.uint32)
        found = (exponents[:, None] | mantissas).reshape(-1)
        patterns = np.resize(np.concatenate([found, found | np.uint32(1 << 31)]), count)
    else:
        patterns = np.arange(count, dtype=np.uint32).astype(np.uint16)
        assert len(np.unique(patterns)) == 65536
    if seed is not None:
        np.random.default_rng(seed).shuffle(patterns)
    signed = patterns.view(np.int32 if spec.dtype == "float32" else np.int16)
    return torch.from_numpy(signed).view(torch_dtype(spec.dtype)).view(spec.page_shape)


def like_kv(spec: PageSpec, seed: int) -> Tensor:
    """Numbers of which those of a channel are of one size, as keys are."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(spec.num_layers, 2, spec.num_kv_heads, 1, spec.head_dim, generator=generator).mul(8).exp2()
    return (torch.randn(spec.page_shape, generator=generator) * scales).to(torch_dtype(spec.dtype))


def file_bytes(pool: DiskPool, slot: int) -> int:
    return sum(os.path.getsize(file) for file in pool.files(slot))


# --- bits ---


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(tmp_path: Path, dtype: str, seed: int | None) -> None:
    spec = replace(WIDE, dtype=dtype)
    pool, page = disk_pool(tmp_path, spec), every_pattern(spec, seed)
    pool.store(3, page)
    assert same(load(pool, 3, spec), page)
    array = zarr.open_array(tmp_path / ARRAY, mode="r")
    assert np.asarray(array[3]).tobytes() == bits(page).tobytes()
    assert not np.asarray(array[2]).any()


def test_it_is_plain_zarr(tmp_path: Path) -> None:
    """A reader needs no codec but those of Zarr itself, and pages are smaller."""
    pool, page = disk_pool(tmp_path, WIDE), like_kv(WIDE, 0)
    pool.store(1, page)
    array: Any = zarr.open_array(tmp_path / ARRAY, mode="r")
    [sharding] = array.metadata.to_dict()["codecs"]
    names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    assert (sharding["name"], names) == ("sharding_indexed", ["transpose", "bytes", "blosc", "crc32c"])
    assert array.shards == (1, 2, 2, 1, 256, 64) and array.chunks == (1, 1, 1, 1, 256, 64)
    assert np.asarray(array[1, 1, 0, 0]).tobytes() == bits(page[1, 0, 0]).tobytes(), "a chunk by itself"
    assert 0.6 < file_bytes(pool, 1) / WIDE.page_bytes < 0.85


@pytest.mark.parametrize("spec", [WIDE, SMALL, replace(SMALL, head_dim=5), replace(WIDE, dtype="float32", head_dim=96)])
def test_a_page_takes_no_more_than_is_counted(tmp_path: Path, spec: PageSpec) -> None:
    pool, page = disk_pool(tmp_path, spec), random_page(spec, 0)
    pool.store(0, page)
    assert same(load(pool, 0, spec), page)
    assert file_bytes(pool, 0) == spec.page_bytes_in(Tier.DISK) == pool.nbytes // pool.num_pages
    assert spec.page_bytes < spec.page_bytes_in(Tier.DISK) < spec.page_bytes_in(Tier.HOST) * 1.3
    assert spec.route_bytes(Tier.HOST, Tier.DISK) == spec.page_bytes


def test_what_the_disk_gave_and_took_is_counted(tmp_path: Path) -> None:
    pool = disk_pool(tmp_path, WIDE)
    pool.store(0, like_kv(WIDE, 0))
    assert pool.meter.take().num_bytes == {"disk_write": file_bytes(pool, 0)}
    load(pool, 0, WIDE)
    index = 2 * WIDE.num_layers * 16 + 4
    assert pool.meter.take().num_bytes == {"disk_read": file_bytes(pool, 0) - index}


def test_threads_write_and_read_at_once(tmp_path: Path) -> None:
    """As those of the mover and of the read-ahead do."""
    spec = replace(WIDE, num_kv_heads=2)
    pool, pages = disk_pool(tmp_path, spec, 100), [like_kv(spec, seed) for seed in range(4)]
    for slot in (0, 1):
        pool.store(slot, pages[slot])

    def work(number: int) -> bool:
        if number % 3 == 0:
            slot = 2 + number % 2
            pool.store(2 + number, pages[slot])
            return same(load(pool, 2 + number, spec), pages[slot])
        layer, out = number % 2, torch.empty(spec.slice_shape, dtype=torch.bfloat16)
        opened.read(number % 2, layer, pool.parts(out))
        return same(out, pages[number % 2][layer])

    with pool.open([0, 1]) as opened, ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(96)))


# --- damage ---


@pytest.fixture
def stored(tmp_path: Path) -> tuple[DiskPool, Tensor, Path, bytes]:
    """A pool with a page that shrinks and one head, the page, its file and what is in that."""
    spec = replace(SMALL, num_kv_heads=1, page_size=32, head_dim=8, dtype="bfloat16")
    pool, page = disk_pool(tmp_path, spec), like_kv(spec, 0)
    pool.store(1, page)
    return pool, page, pool.chunk_path(1, 0), pool.chunk_path(1, 0).read_bytes()


def refused(pool: DiskPool) -> bool:
    """Whether the page cannot be read, which is the only other thing that may happen than that it is right."""
    try:
        load(pool, 1, pool.spec)
    except StoreError as error:
        assert str(pool.chunk_path(1, 0)) in str(error)
        return True
    return False


def write(path: Path, content: bytes | bytearray, offset: int = 0) -> None:
    """Over what is in a file."""
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), content, offset)


def test_every_flipped_bit_is_found(
    stored: tuple[DiskPool, Tensor, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Blosc sees it."""
    pool, page, path, content = stored
    decompress, entries = blosc.decompress, entries_of(content)
    whole = {content[offset : offset + size - 4] for offset, size in entries}

    def checked(packed: memoryview) -> bytes:
        assert bytes(packed) in whole
        unpacked = decompress(packed)
        assert isinstance(unpacked, bytes)
        return unpacked

    monkeypatch.setattr(blosc, "decompress", checked)
    assert len(content) < page.nbytes
    for place in range(len(content)):
        write(path, bytes([content[place] ^ 1 << place % 8]), place)
        assert refused(pool), f"byte {place}"
        write(path, content[place : place + 1], place)
    assert pool.meter.take().checksum_failures == len(content)
    assert same(load(pool, 1, pool.spec), page)


def test_every_truncation_is_found(stored: tuple[DiskPool, Tensor, Path, bytes]) -> None:
    """At once, or when it comes while the file is being read."""
    pool, page, path, content = stored
    with pool.open([1]) as opened:
        layer = torch.empty(pool.spec.slice_shape, dtype=page.dtype)
        opened.read(0, 0, pool.parts(layer))
        os.truncate(path, len(content) - 1)
        opened.read(0, 1, pool.parts(layer))
        assert same(layer, page[1])
        with pytest.raises(StoreError, match="is cut short in layer 2"):
            opened.read(0, 2, pool.parts(layer))
    for size in range(len(content) - 1, -1, -1):
        os.truncate(path, size)
        assert refused(pool), f"{size} bytes of {len(content)}"
    path.write_bytes(content + b"more")
    assert refused(pool)
    path.write_bytes(content)
    assert same(load(pool, 1, pool.spec), page)


def entries_of(content: bytes) -> np.ndarray:
    """Offset and length of the keys and of the values of three layers."""
    return np.frombuffer(content[:96], "<u8").reshape(-1, 2).copy()


def test_a_wrong_index_is_found(stored: tuple[DiskPool, Tensor, Path, bytes]) -> None:
    """Its checksum is right: it was made so, or is that of another file."""
    pool, _, path, content = stored
    rng = random.Random(0)
    odd = [0, 1, 15, 19, 20, 100, len(content), 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
    for number in range(300):
        entries = entries_of(content)
        row, column = rng.randrange(6), rng.randrange(2)
        if number % 5 == 0:
            entries[[row, row - 1]] = entries[[row - 1, row]]
        else:
            entries[row, column] = odd[number % len(odd)] if number < 150 else rng.randrange(len(content))
        index = entries.tobytes()
        write(path, index + struct.pack("<I", crc32c(index)))
        assert refused(pool) or content.startswith(index)


def test_what_blosc_gets_may_be_anything(stored: tuple[DiskPool, Tensor, Path, bytes]) -> None:
    """Chunks whose checksums somebody has made right again: what comes of them is checked too."""
    pool, page, path, content = stored
    rng, num_damaged, entries = random.Random(0), 0, entries_of(content).tolist()
    for _ in range(1000):
        offset, size = rng.choice(entries)
        damaged = bytearray(content[offset : offset + size - 4])
        for _ in range(rng.choice([1, 1, 1, 4])):
            place = rng.randrange(24) if rng.random() < 0.5 else rng.randrange(len(damaged))
            damaged[place] = rng.choice([0, 1, 255, rng.randrange(256)])
        write(path, damaged + struct.pack("<I", crc32c(damaged)), offset)
        if refused(pool):
            num_damaged += 1
        else:
            assert same(load(pool, 1, pool.spec), page)
        write(path, content[offset : offset + size], offset)
    assert num_damaged > 700


# --- folders ---


def test_it_outlives_a_process(tmp_path: Path) -> None:
    process = DiskProcess(tmp_path, 8, SMALL)
    for slot in (6, 0, 3):
        process.write(slot, slot)
    process.kill()
    for num_pages in (8, 3):
        process = DiskProcess(tmp_path, num_pages, SMALL)
        assert process.read() == {6, 0, 3}
        process.close()


@pytest.mark.parametrize("before, after", [(SPEC, SMALL), (SMALL, SPEC)])
def test_pages_of_another_codec_are_never_read(tmp_path: Path, before: PageSpec, after: PageSpec) -> None:
    """They lie elsewhere, as their fingerprint is another; a folder of the right name and the wrong content is given
    up, by the leader as by a rank with a disk of its own."""
    process = DiskProcess(tmp_path, 8, before)
    process.write(2, 2)
    process.close()
    checksums = process.pool.checksums(2)
    reopen(tmp_path, after, 8, description(after))
    assert listed(tmp_path) == set()
    pool = DiskPool(after, tmp_path, 8, DiskShare.of_all(after))
    pool.adopt({2: checksums})  # as a wrong catalogue would have it
    with pytest.raises(StoreError):
        load(pool, 2, after)
    pool.adopt({})
    pool.store(1, random_page(after, 1))
    rejoin(tmp_path, before, 8)
    array: Any = zarr.open_array(tmp_path / ARRAY, mode="r")
    assert (array.shards is None) == (before.disk_codec == "none")
