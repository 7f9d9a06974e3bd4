"""The pools of the three tiers keep every bit; the disk tier notices damage, survives kills and refuses what is not its
own."""

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from crc32c import crc32c
from support.damage import cut_short, damages, flip_bit
from support.disks import NUM_PAGES, disk_pool, entry, file_size_limit, partial_files, share
from support.pages import SPEC, bits, load, random_page, same, store
from support.processes import kill, read_line, start_python
from torch import Tensor

from distkv.cache_folders.file_damage import file_damage
from distkv.errors import CapacityError, ConfigError, StoreError
from distkv.storage.device import CpuDevice
from distkv.storage.disk.cache_folder import FolderLock
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.disk.disk_array import make_array, remove_array
from distkv.storage.disk.page_arrays import ARRAY
from distkv.storage.dtypes import DTYPES, torch_dtype
from distkv.storage.page_spec import DISK_CODECS, PageSpec
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.pools.page_pool import PagePool
from distkv.storage.process_limits import available_bytes

AnyPool = PagePool | HostPool


# --- what all pools do ---


@pytest.fixture(params=DTYPES)
def spec(request: pytest.FixtureRequest) -> PageSpec:
    return PageSpec(3, 2, 16, 4, request.param)


@pytest.fixture(params=["device", "host", "disk", "disk, lossless", "disk, second rank"])
def pool(request: pytest.FixtureRequest, spec: PageSpec, tmp_path: Path) -> Iterator[AnyPool]:
    made: AnyPool
    if request.param == "device":
        made = DevicePool(spec, NUM_PAGES, CpuDevice())
    elif request.param == "host":
        made = HostPool(spec, NUM_PAGES, pinned=False)
    elif request.param == "disk":
        made = disk_pool(tmp_path, spec)
    elif request.param == "disk, lossless":
        made = disk_pool(tmp_path, replace(spec, disk_codec="lossless"))
    else:
        make_array(tmp_path, replace(spec, num_kv_heads=3), NUM_PAGES)
        made = DiskPool(spec, tmp_path, NUM_PAGES, share(spec, 1, 3))
    yield made
    made.close()


def test_pages_come_back_bit_for_bit(pool: AnyPool, spec: PageSpec) -> None:
    pages = [random_page(spec, seed) for seed in range(NUM_PAGES)]
    assert any(page.isnan().any() for page in pages)
    for slot, page in enumerate(pages):
        store(pool, slot, page)
    for slot, page in enumerate(pages):
        assert same(load(pool, slot, spec), page)


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), float("inf"), 1e-45])
def test_pages_of_one_value(pool: AnyPool, spec: PageSpec, value: float) -> None:
    """All-zero pages are no holes, and a negative zero stays one."""
    page = torch.full(spec.page_shape, value, dtype=torch_dtype(spec.dtype))
    store(pool, 2, page)
    assert same(load(pool, 2, spec), page)


def test_overwriting_a_slot_leaves_its_neighbours(pool: AnyPool, spec: PageSpec) -> None:
    pages = [random_page(spec, seed) for seed in range(NUM_PAGES)]
    for slot, page in enumerate(pages):
        store(pool, slot, page)
    for slot, seed in [(0, 100), (5, 101), (5, 102), (NUM_PAGES - 1, 103)]:
        pages[slot] = random_page(spec, seed)
        store(pool, slot, pages[slot])
        assert all(same(load(pool, other, spec), page) for other, page in enumerate(pages))


def test_a_stored_page_is_a_copy(pool: AnyPool, spec: PageSpec) -> None:
    page = random_page(spec, 0)
    store(pool, 1, page)
    expected = page.clone()
    page.zero_()
    assert same(load(pool, 1, spec), expected)
    load(pool, 1, spec).zero_()
    assert same(load(pool, 1, spec), expected)


@pytest.mark.parametrize("slot", [-1, NUM_PAGES, NUM_PAGES + 100, -NUM_PAGES])
def test_slots_outside_the_pool_are_refused(pool: AnyPool, spec: PageSpec, slot: int) -> None:
    page = random_page(spec, 0)
    calls: list[Callable[[], None]] = [
        lambda: store(pool, slot, page),
        lambda: load(pool, slot, spec),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=f"slot {slot} is outside a pool of {NUM_PAGES} pages"):
            call()


def test_threads_use_different_slots_at_the_same_time(pool: AnyPool, spec: PageSpec) -> None:
    """One slot is read by all."""
    shared = random_page(spec, 1000)
    store(pool, NUM_PAGES - 1, shared)

    def work(slot: int) -> None:
        for seed in range(slot, 15 * NUM_PAGES, NUM_PAGES):
            page = random_page(spec, seed)
            store(pool, slot, page)
            assert same(load(pool, slot, spec), page)
            assert same(load(pool, NUM_PAGES - 1, spec), shared)

    with ThreadPoolExecutor(NUM_PAGES - 1) as threads:
        list(threads.map(work, range(NUM_PAGES - 1)))


def test_memory_is_given_back(spec: PageSpec) -> None:
    device, host = DevicePool(spec, 4, CpuDevice()), HostPool(spec, 4, pinned=False)
    for pool in (device, host):
        store(pool, 0, random_page(spec, 0))
        pool.close()
        pool.close()
        with pytest.raises(IndexError):
            load(pool, 0, spec)
    assert device.data.untyped_storage().nbytes() == 0


# --- device ---


def test_device_pages_as_rows(spec: PageSpec) -> None:
    """What copies between device and host go by: each part of a row is a contiguous piece of the pool."""
    pool = DevicePool(spec, 4, CpuDevice())
    pages = [random_page(spec, seed) for seed in range(4)]
    for slot, page in enumerate(pages):
        for part, piece in zip(pool.rows()[slot], page.flatten(0, 1).flatten(1), strict=True):
            assert part.is_contiguous()
            part.view(torch.uint8).copy_(piece.view(torch.uint8))
    assert all(same(load(pool, slot, spec), page) for slot, page in enumerate(pages))


# --- host ---


def test_host_pages_lie_in_one_block() -> None:
    pool = HostPool(SPEC, 4, pinned=False)
    pages = [random_page(SPEC, seed) for seed in range(4)]
    for slot, page in enumerate(pages):
        store(pool, slot, page)
    assert same(pool.slices(1, 3, 2), torch.stack([page[2] for page in pages[1:]]))
    assert pool.slices(1, 3, 2).data_ptr() == pool.page(1)[2].data_ptr()
    assert same(pool.rows()[1].view(SPEC.page_shape), pages[1])
    assert same(pool.layer_rows(2)[3, 0].view(SPEC.slice_shape), pages[3][2])
    for first, count in [(-1, 1), (4, 1), (2, 3)]:
        with pytest.raises(IndexError):
            pool.slices(first, count, 0)


def test_a_host_without_so_much_memory() -> None:
    with pytest.raises(CapacityError, match=r"the host has no \d+ bytes of memory to give; lower host_kv_bytes"):
        HostPool(SPEC, 2**47 // SPEC.page_bytes, pinned=False)


def test_memory_that_is_not_touched_is_not_taken() -> None:
    """A pool as large as all that is free would not do otherwise."""
    pool = HostPool(SPEC, available_bytes() // SPEC.page_bytes, pinned=False)
    page = random_page(SPEC, 0)
    store(pool, pool.num_pages - 1, page)
    assert same(load(pool, pool.num_pages - 1), page)
    pool.close()


# --- disk: the array ---


def test_the_array_is_plain_zarr_over_the_heads_of_all_ranks(spec: PageSpec, tmp_path: Path) -> None:
    """Three heads split 2 + 1; anyone can read them with zarr."""
    whole = PageSpec(spec.num_layers, 3, spec.page_size, spec.head_dim, spec.dtype)
    split = [(replace(whole, num_kv_heads=2), 0), (replace(whole, num_kv_heads=1), 2)]
    make_array(tmp_path, whole, 4)
    ranks = [DiskPool(own, tmp_path, 4, share(own, head, 3)) for own, head in split]
    pages = {slot: random_page(whole, slot) for slot in (0, 3)}
    for slot, page in pages.items():
        ranks[1].store(slot, page[:, :, 2:].contiguous())
        ranks[0].store(slot, page[:, :, :2].contiguous())
    array = zarr.open(tmp_path / ARRAY, mode="r")
    assert isinstance(array, zarr.Array)
    assert array.shape == (4, 3, 2, 3, 16, 4)
    assert array.dtype == {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}[spec.dtype]
    assert array.attrs["dtype"] == spec.dtype
    for slot, page in pages.items():
        assert np.asarray(array[slot]).tobytes() == bits(page).tobytes()
        assert same(load(ranks[0], slot, ranks[0].spec), page[:, :, :2])
        assert same(load(ranks[1], slot, ranks[1].spec), page[:, :, 2:])
    assert not np.asarray(array[1]).any()
    files = {path.name for path in (tmp_path / ARRAY).iterdir()}
    assert files == {"zarr.json"} | {f"c.{slot}.0.0.{head}.0.0" for slot in (0, 3) for head in range(3)}
    assert ranks[0].chunk_path(3, 1).name == "c.3.0.0.1.0.0" and ranks[1].chunk_path(3, 0).name == "c.3.0.0.2.0.0"


@pytest.mark.parametrize("codec", DISK_CODECS)
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
def test_pages_of_codes(tmp_path: Path, kv_cache_dtype: str, codec: str) -> None:
    """Bytes, of which there are fewer than on the device; `distkv cache verify` knows how many."""
    spec = PageSpec(3, 2, 64, 16, "bfloat16", kv_cache_dtype, codec)
    pool, page = disk_pool(tmp_path, spec), torch.randint(256, spec.page_shape, dtype=torch.uint8)
    pool.store(2, page)
    found = torch.zeros_like(page)
    pool.load(2, found)
    assert torch.equal(found, page) and page.nbytes < 0.7 * spec.page_bytes
    assert np.asarray(zarr.open_array(tmp_path / ARRAY, mode="r")[2]).tobytes() == page.numpy().tobytes()
    assert pool.adopt({2: pool.checksums(2)}) == []
    checksums = np.frombuffer(pool.checksums(2), np.uint32).reshape(2, 3)
    for head in range(2):
        assert file_damage(pool.chunk_path(2, head), checksums[head].tolist(), spec) is None
        assert file_damage(pool.chunk_path(2, head), checksums[head - 1].tolist(), spec) is not None


def test_chunks_are_raw(tmp_path: Path) -> None:
    """A file is a head of the page, and `checksums` are those of its layers."""
    pool = disk_pool(tmp_path)
    page = random_page(SPEC, 0)
    pool.store(4, page)
    checksums = np.frombuffer(pool.checksums(4), np.uint32).reshape(SPEC.num_kv_heads, SPEC.num_layers)
    for head in range(SPEC.num_kv_heads):
        assert pool.chunk_path(4, head).read_bytes() == bits(page[:, :, head]).tobytes()
        assert checksums[head].tolist() == [crc32c(bits(layer[:, head]).tobytes()) for layer in page]
    metadata = json.loads((tmp_path / ARRAY / "zarr.json").read_text())
    assert [codec["name"] for codec in metadata["codecs"]] == ["bytes"]


# --- disk: damage ---


@pytest.fixture
def two_chunks(tmp_path: Path) -> tuple[DiskPool, list[Tensor]]:
    """A pool with two chunks a page, and its pages."""
    pool = disk_pool(tmp_path, SPEC, 4)
    pages = [random_page(SPEC, seed) for seed in range(3)]
    for slot, page in enumerate(pages):
        pool.store(slot, page)
    return pool, pages


def read_layer(pool: DiskPool, slot: int, layer: int, out: Tensor) -> None:
    with pool.open([slot]) as pages:
        pages.read(0, layer, pool.parts(out))


CAUSES: dict[Callable[[Path], object], str] = {
    flip_bit: "is damaged: the checksum of layer 1 is wrong",
    cut_short: "is cut short in layer 1",
    Path.unlink: "cannot be read: No such file or directory",
}


@pytest.mark.parametrize("chunk", [0, 1])
@damages
def test_damage_is_noticed(
    two_chunks: tuple[DiskPool, list[Tensor]], damage: Callable[[Path], object], chunk: int
) -> None:
    pool, pages = two_chunks
    path = pool.chunk_path(1, chunk)
    damage(path)
    cause = f"{path} {CAUSES[damage]}"
    out = torch.empty(SPEC.slice_shape)
    for read in (lambda: load(pool, 1), lambda: read_layer(pool, 1, 1, out)):
        with pytest.raises(StoreError) as error:
            read()
        assert str(error.value) == cause
    if damage is not Path.unlink:  # a layer is checked by itself
        read_layer(pool, 1, 0, out)
        assert same(out, pages[1][0])
    assert same(load(pool, 0), pages[0]) and same(load(pool, 2), pages[2])
    pool.store(1, pages[2])
    assert same(load(pool, 1), pages[2])


def test_a_slot_that_was_never_stored(two_chunks: tuple[DiskPool, list[Tensor]]) -> None:
    pool, _ = two_chunks
    for read in (lambda: load(pool, 3), lambda: pool.open([3])):
        with pytest.raises(StoreError, match=r"slot 3 of .* holds no page"):
            read()


@pytest.mark.parametrize("max_open", [0, 1, 3, 100])
def test_open_pages_are_read_from_threads(
    two_chunks: tuple[DiskPool, list[Tensor]], max_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few files or all of them stay open, and none does afterwards."""
    monkeypatch.setattr("distkv.storage.pools.open_pages.MAX_OPEN", max_open)
    pool, pages = two_chunks
    files = [(slot, chunk) for slot in (2, 0, 1) for chunk in (0, 1)]
    pool.chunk_path(1, 1).unlink()
    before = len(os.listdir("/proc/self/fd"))
    opened = pool.open([2, 0, 1])
    assert len(os.listdir("/proc/self/fd")) - before == min(max_open, len(files) - 1)

    def read(job: tuple[int, int]) -> None:
        index, layer = job
        out = torch.empty(SPEC.slice_shape)
        if index == 2:
            with pytest.raises(StoreError, match="cannot be read: No such file"):
                opened.read(index, layer, pool.parts(out))
        else:
            opened.read(index, layer, pool.parts(out))
            assert same(out, pages[[2, 0][index]][layer])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, [(index, layer) for layer in range(SPEC.num_layers) for index in range(3)] * 5))
    opened.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- disk: no room ---

LARGE = PageSpec(num_layers=4, num_kv_heads=2, page_size=64, head_dim=16, dtype="float32")


def check_refused(pool: DiskPool, folder: Path, slot: int, page: Tensor, message: str) -> None:
    """Storing fails, and leaves an empty slot and no file half written."""
    with pytest.raises(StoreError, match=message) as error:
        pool.store(slot, page)
    assert str(folder / ARRAY) in str(error.value)
    assert partial_files(folder) == [] and not list((folder / ARRAY).glob(f"c.{slot}.*")), "no part of a page"
    with pytest.raises(StoreError, match=f"slot {slot} .* holds no page"):
        load(pool, slot, LARGE)


@pytest.mark.parametrize("codec", DISK_CODECS)
def test_a_write_that_fails_midway(tmp_path: Path, codec: str) -> None:
    pool = disk_pool(tmp_path, replace(LARGE, disk_codec=codec))
    first, second = random_page(LARGE, 0), random_page(LARGE, 1)
    pool.store(0, first)
    pool.store(1, first)
    with file_size_limit(LARGE.page_bytes // 4):
        for slot in (1, 2):
            check_refused(pool, tmp_path, slot, second, os.strerror(errno.EFBIG))
        assert same(load(pool, 0, LARGE), first)
    for slot in (1, 2):
        pool.store(slot, second)
        assert same(load(pool, slot, LARGE), second)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount; test_a_write_that_fails_midway does not")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("codec", DISK_CODECS)
def test_a_full_disk(small_disk: Path, codec: str) -> None:
    """Random bits take no less room when they are compressed."""
    pool = disk_pool(small_disk, replace(LARGE, disk_codec=codec))
    pages = [random_page(LARGE, seed) for seed in range(4)]
    for slot in range(3):
        pool.store(slot, pages[slot])
    full = "No space left on device; make room on the disk or lower disk_kv_bytes"
    check_refused(pool, small_disk, 3, pages[3], full)
    pool.store(1, pages[3])  # in the room of the old page
    assert same(load(pool, 1, LARGE), pages[3])
    for slot in (0, 2):
        assert same(load(pool, slot, LARGE), pages[slot])
    for head in range(LARGE.num_kv_heads):
        pool.chunk_path(0, head).unlink()
    pool.store(3, pages[3])
    assert same(load(pool, 3, LARGE), pages[3])
    with ThreadPoolExecutor(3) as threads:  # each in its own room, though there is none for another head
        for start in range(20):
            list(threads.map(pool.store, (1, 2, 3), (pages[(start + slot) % 4] for slot in range(3))))
    for slot, page in zip((1, 2, 3), (pages[(19 + slot) % 4] for slot in range(3)), strict=True):
        assert same(load(pool, slot, LARGE), page)


# --- disk: the folder ---


def start(code: str, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Runs code in another process, which has `folder`, SPEC's pools and `kill_at` at hand."""
    prelude = """
import os, signal, sys
from pathlib import Path
from support.disks import disk_pool, entry
from support.kill_points import kill_at
from support.pages import SPEC, random_page
from distkv.storage.disk.cache_folder import FolderLock
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.disk.disk_array import remove_array
folder = Path(sys.argv[1])
"""
    return start_python(prelude + code, folder, *arguments)


def test_a_folder_is_used_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    other = start("lock = FolderLock(folder); print('locked', flush=True); sys.stdin.read(); signal.pause()", folder)
    try:
        assert read_line(other) == "locked"
        with pytest.raises(ConfigError, match=f"is in use by process {other.pid} on .*; end that, or name another"):
            FolderLock(folder)
    finally:
        kill(other)
    lock = FolderLock(folder)
    with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on"):
        FolderLock(folder)
    lock.release()
    FolderLock(folder).release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be used \(Not a directory\); name a folder that can be written"):
        FolderLock(tmp_path / "file" / "cache")


KILLS = {
    "while it makes the array": "kill_at('os.rename', 1); disk_pool(folder)",
    "while it writes a page": (
        "pool = disk_pool(folder); pool.store(0, random_page(SPEC, 0)); kill_at('os.rename', 1);"
        "pool.store(1, random_page(SPEC, 1))"
    ),
    "while it has pages": (
        "pool = disk_pool(folder); pool.store(0, random_page(SPEC, 0)); Catalogue(folder).update([], [entry(0)]);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    ),
    **{
        f"before it removes file {number}": (
            "pool = disk_pool(folder); [pool.store(slot, random_page(SPEC, slot)) for slot in range(4)];"
            f"kill_at('os.remove', {number}); remove_array(folder)"
        )
        for number in (1, 3, 5)
    },
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """For each of `KILLS` the folder as a process has left it, and that one's exit code. They are forked from one that
    has imported what all need, which takes longer than what they do."""
    folders = {when: tmp_path_factory.mktemp("killed") for when in KILLS}
    code = (
        "import json\n"
        "for code, name in json.loads(sys.argv[2]):\n"
        "    if (child := os.fork()) == 0: folder = Path(name); exec(code); os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    parent = start(code, Path(), json.dumps([(KILLS[when], str(folder)) for when, folder in folders.items()]))
    codes = map(int, parent.communicate()[0].split())
    return {when: (folder, code) for (when, folder), code in zip(folders.items(), codes, strict=True)}


@pytest.mark.parametrize("when", KILLS)
def test_what_a_killed_process_left_is_swept_away(killed: dict[str, tuple[Path, int]], when: str) -> None:
    folder, code = killed[when]
    assert code == -signal.SIGKILL
    assert (folder / ARRAY).exists()
    # the files of a page are written side by side, so that a kill may find each of them half written
    is_partial = when in ("while it makes the array", "while it writes a page")
    assert bool(partial_files(folder)) == is_partial
    pool = disk_pool(folder)
    assert [path.name for path in folder.rglob("*")] == [ARRAY, "zarr.json"]
    page = random_page(SPEC, 9)
    pool.store(0, page)
    assert same(load(pool, 0), page)


def foreign_array(path: Path) -> None:
    zarr.create_array(path, shape=(4,), dtype="f4")[:] = 1


def foreign_group(path: Path) -> None:
    zarr.create_group(path)


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("the only copy")


def foreign_file(path: Path) -> None:
    path.write_text("the only copy")


@pytest.mark.parametrize("make", [foreign_array, foreign_group, foreign_folder, foreign_file])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ARRAY)
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"kv.zarr' was not made by distkv; name another cache_dir"):
        disk_pool(tmp_path)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_remove_array(tmp_path: Path) -> None:
    disk_pool(tmp_path).store(0, random_page(SPEC, 0))
    Catalogue(tmp_path).close()
    (tmp_path / "note").touch()
    remove_array(tmp_path)
    remove_array(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


# --- disk: the catalogue ---


def test_catalogue(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    assert catalogue.entries() == []
    catalogue.update([], [entry(3, b"three"), entry(1, b"one")])
    catalogue.update([3, 7], [entry(2, b"two"), entry(1, b"uno")])
    catalogue.update([2], [entry(2, b"due")])  # what is removed and added is there
    assert catalogue.entries() == [entry(1, b"uno"), entry(2, b"due")]
    catalogue.close()
    reopened = Catalogue(tmp_path)
    assert reopened.entries() == [entry(1, b"uno"), entry(2, b"due")]
    reopened.close()


def test_a_catalogue_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"the catalogue in {tmp_path / 'none'} cannot be opened"):
        Catalogue(tmp_path / "none")
    catalogue = Catalogue(tmp_path)
    catalogue.update([], [entry(0)])
    with (
        file_size_limit(0),
        pytest.raises(StoreError, match=f"the catalogue in {tmp_path} cannot be written"),
    ):
        catalogue.update([0], [entry(slot, bytes(10_000)) for slot in range(1, 9)])
    with pytest.raises(StoreError, match="NOT NULL constraint failed"):
        catalogue.update([0], [entry(1), entry(2)._replace(crc32c=None)])  # type: ignore[arg-type]
    assert catalogue.entries() == [entry(0)]  # all or nothing
    catalogue.close()


WRITER = """
pool, catalogue = disk_pool(folder), Catalogue(folder)
for number in range(10**9):
    slot = number % 3
    catalogue.update([slot], [])
    pool.store(slot, random_page(SPEC, number))
    catalogue.update([], [entry(slot, pool.checksums(slot))])
    print(number, flush=True)
"""


@pytest.mark.parametrize("pages", [1, 10, 35])
def test_what_a_kill_leaves_listed_is_whole(tmp_path: Path, pages: int) -> None:
    writer = start(WRITER, tmp_path)
    try:
        for number in range(pages):
            assert read_line(writer) == str(number)
    finally:
        kill(writer)
    catalogue = Catalogue(tmp_path)
    entries = catalogue.entries()
    catalogue.close()
    assert len(entries) >= min(pages, 3) - 1  # one may just be written
    for one in entries:
        checksums = np.frombuffer(one.crc32c, np.uint32).reshape(SPEC.num_kv_heads, -1)
        for head in range(SPEC.num_kv_heads):
            data = (tmp_path / ARRAY / f"c.{one.slot}.0.0.{head}.0.0").read_bytes()
            assert len(data) == SPEC.page_bytes // SPEC.num_kv_heads
            layers = np.frombuffer(data, np.uint8).reshape(SPEC.num_layers, -1)
            assert [crc32c(layer.tobytes()) for layer in layers] == checksums[head].tolist()


def test_a_device_without_the_memory_says_how_much_is_missing() -> None:
    with pytest.raises(CapacityError, match=r"take \d+ bytes and \d+ are free .* lower device_kv_bytes by \d+"):
        DevicePool(SPEC, 2**45 // SPEC.page_bytes * 64, CpuDevice())
