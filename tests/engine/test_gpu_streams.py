"""Copies between device, pinned memory and disk on a CUDA device as the host runs ahead. Run with `pytest -m gpu`."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distkv.errors import CapacityError
from distkv.storage.device import CudaDevice
from distkv.storage.dtypes import torch_dtype
from distkv.storage.moving.mover import Mover
from distkv.storage.moving.page_copies import PageCopies
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.moving.streams import Lane
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools import host_memory
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.host_memory import HostBuffer
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, Transfer, encode_location

pytestmark = pytest.mark.gpu

SPEC = PageSpec(num_layers=4, num_kv_heads=2, page_size=64, head_dim=64, dtype="bfloat16")
CUDA = CudaDevice(torch.device("cuda"))
SLEEP = 20_000_000  # cycles, some 10 ms: what is enqueued behind them has not begun when the host goes on


def page_of(value: int) -> Tensor:
    """A page whose bits tell its number and the place in it."""
    places = torch.arange(SPEC.page_bytes // 2, dtype=torch.int32).view(SPEC.page_shape)
    return (places * 31 + value * 1009).to(torch.int16).view(torch.bfloat16)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.cpu().contiguous().view(torch.int16), y.cpu().contiguous().view(torch.int16))


@pytest.fixture(params=["copy engine", "gather kernel"])
def copies(request: pytest.FixtureRequest) -> PageCopies:
    from distkv.kernels.cuda.page_copy import copy_pages

    made = CUDA.make_copies()
    if request.param == "gather kernel":
        made.kernels = {lane: copy_pages for lane in (Lane.LOAD, Lane.FETCH, Lane.SPILL)}
    return made


@pytest.fixture
def pinned() -> Iterator[HostPool]:
    pool = HostPool(SPEC, 8, pinned=CUDA.pinned)
    for slot in range(8):
        pool.page(slot).copy_(page_of(slot))
    yield pool
    torch.cuda.synchronize()
    pool.close()


def test_both_ways_of_copying_keep_every_bit(copies: PageCopies, pinned: HostPool) -> None:
    device = DevicePool(SPEC, 8, CUDA)
    torch.cuda.synchronize()
    there = copies.prepare(Lane.FETCH, [(0, 5), (1, 2), (7, 0)], pinned.piece_pages)
    copies.start(Lane.FETCH, pinned.rows(), device.rows(), there)
    torch.cuda.synchronize()
    for source, target in there.rows.tolist():
        assert same_bits(device.data[:, :, target], page_of(source))
    assert not device.data[:, :, [1, 3, 4, 6, 7]].any()
    spills = copies.prepare(Lane.SPILL, [(5, 3), (2, 6)], pinned.piece_pages)
    copies.start(Lane.SPILL, device.rows(), pinned.rows(), spills)
    torch.cuda.synchronize()
    for slot, value in enumerate([0, 1, 2, 0, 4, 5, 1, 7]):
        assert same_bits(pinned.page(slot), page_of(value))


@pytest.mark.parametrize("piece", [3, 100])
def test_neighbours_cross_together(copies: PageCopies, pinned: HostPool, piece: int) -> None:
    device = DevicePool(SPEC, 8, CUDA)
    torch.cuda.synchronize()
    copies.start(Lane.FETCH, pinned.rows(), device.rows(), copies.prepare(Lane.FETCH, [(1, 3), (2, 4), (3, 5)], piece))
    buffer = torch.zeros(6, *SPEC.slice_shape, dtype=torch_dtype(SPEC.dtype), device="cuda")
    torch.cuda.synchronize()
    loads = copies.prepare(Lane.LOAD, [(2, 0), (3, 1), (4, 2), (7, 5)], piece)
    copies.start(Lane.LOAD, pinned.layer_rows(2), buffer.flatten(1)[:, None], loads)
    torch.cuda.synchronize()
    for source in (1, 2, 3):
        assert same_bits(device.data[:, :, source + 2], page_of(source))
    for index, value in enumerate([2, 3, 4, None, None, 7]):
        assert not buffer[index].any() if value is None else same_bits(buffer[index], page_of(value)[2])
    spills = copies.prepare(Lane.SPILL, [(3, 5), (4, 6), (5, 7)], piece)
    copies.start(Lane.SPILL, device.rows(), pinned.rows(), spills)
    torch.cuda.synchronize()
    for slot, value in enumerate([0, 1, 2, 3, 4, 1, 2, 3]):
        assert same_bits(pinned.page(slot), page_of(value))


def test_memory_of_several_pieces_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PIN_CHUNK", 2**20)
    buffer = HostBuffer((9, 2**19), torch.uint8, pinned=True)
    assert buffer.piece_rows == 2 and all(row.is_pinned() for row in buffer.data)
    buffer.close()


def test_a_refused_pin_is_not_the_error_of_the_next_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = torch.cuda.cudart()

    def twice(address: int, size: int, flags: int) -> int:
        assert int(driver.cudaHostRegister(address, size, flags)) == 0
        error = int(driver.cudaHostRegister(address, size, flags))
        driver.cudaHostUnregister(address)
        return error

    stand_in = SimpleNamespace(cudaHostRegister=twice, cudaHostUnregister=driver.cudaHostUnregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: stand_in)
    with pytest.raises(CapacityError, match="cannot be pinned"):
        HostBuffer((4, 2**20), torch.uint8, pinned=True)
    assert torch.ones(4, device="cuda").add_(1).tolist() == [2.0] * 4


def test_spills_and_fetches_over_reused_slots(copies: PageCopies, pinned: HostPool) -> None:
    """The device is behind the host all the time; slots are filled again as soon as plans allow it."""
    device = DevicePool(SPEC, 4, CUDA)
    mover, ids, found = Mover(device, pinned, None, copies), count(), []
    torch.cuda.synchronize()
    for step in range(40):
        slot, other = step % 4, (step + 1) % 4
        device.data[:, :, slot].copy_(page_of(100 + step).cuda())
        torch.cuda._sleep(SLEEP // 10)
        device.data[:, :, slot].copy_(device.data[:, :, slot].clone())  # read and written late
        spill = Transfer(next(ids), Tier.DEVICE, slot, Tier.HOST, step % 3)
        fetch = Transfer(next(ids), Tier.HOST, step % 3, Tier.DEVICE, other)  # what was just spilled
        again = Transfer(next(ids), Tier.HOST, 4 + step % 4, Tier.DEVICE, slot)  # where it was spilled from
        mover.start([spill, fetch, again], [spill.id, fetch.id, again.id])
        found.append((100 + step, device.data[:, :, other].clone()))
        found.append((4 + step % 4, device.data[:, :, slot].clone()))
    ends = list(range(next(ids)))
    mover.wait(ends)
    assert mover.report().done == ends
    torch.cuda.synchronize()
    for value, page in found:
        assert same_bits(page, page_of(value))
    mover.close()


def test_loads_run_ahead_and_slots_are_filled_behind_them(copies: PageCopies, pinned: HostPool) -> None:
    """Steps follow each other without the host waiting; between them a spill fills what the one before has streamed."""
    device = DevicePool(SPEC, 2, CUDA)
    mover = Mover(device, pinned, None, copies)
    ring = StagingRing(SPEC, NUM_BUFFERS * 3, pinned, None, None, CUDA, copies, mover.filling)
    loads, content, found = [[3, 4, 5], [7, 0], [1], [6, 2]], list(range(8)), []
    for step in range(12):
        stream = ring.begin([[encode_location(Tier.HOST, slot) for slot in load] for load in loads])
        for layer in range(SPEC.num_layers):
            for load in loads:
                buffer = stream.take()
                torch.cuda._sleep(SLEEP // 100)
                found.append((layer, [content[slot] for slot in load], buffer.clone()))
        stream.close()
        device.data[:, :, 0].copy_(page_of(200 + step).cuda())
        content[step % 8] = 200 + step
        mover.start([Transfer(step, Tier.DEVICE, 0, Tier.HOST, step % 8)], [step])
    torch.cuda.synchronize()
    for layer, values, pages in found:
        for value, page in zip(values, pages, strict=True):
            assert same_bits(page, page_of(value)[layer])
    mover.close()
    ring.close()


def test_disk_reads_run_ahead(tmp_path: Path, copies: PageCopies, pinned: HostPool) -> None:
    """Through memory for a few slices, which is read into again while the device is behind."""
    pytest.importorskip("zarr", reason="the disk tier's array is made by zarr")
    from distkv.storage.disk.disk_array import make_array
    from distkv.storage.disk.page_arrays import DiskShare
    from distkv.storage.moving.read_ahead import ReadAhead
    from distkv.storage.pools.disk_pool import DiskPool

    make_array(tmp_path, SPEC, 6)
    disk = DiskPool(SPEC, tmp_path, 6, DiskShare.of_all(SPEC))
    for slot in range(6):
        disk.store(slot, page_of(50 + slot))
    disk.chunk_path(4, 0).unlink()
    memory = ReadAhead(SPEC, 3, disk, pinned=CUDA.pinned)
    ring = StagingRing(SPEC, NUM_BUFFERS * 2, pinned, disk, memory, CUDA, copies)
    places = [encode_location(Tier.DISK, slot) for slot in range(6)]
    loads = [places[:2], [encode_location(Tier.HOST, 3), places[2]], places[3:5], places[5:]]
    values = [[50, 51], [3, 52], [53, None], [55]]
    found = []
    for _ in range(5):
        stream = ring.begin(loads)
        for layer in range(SPEC.num_layers):
            for expected in values:
                buffer = stream.take()
                torch.cuda._sleep(SLEEP // 50)
                found.append((layer, expected, buffer.clone()))
        stream.close()
        assert list(stream.bad_reads) == [4]
    torch.cuda.synchronize()
    for layer, expected, pages in found:
        for value, page in zip(expected, pages, strict=True):
            assert not page.any() if value is None else same_bits(page, page_of(value)[layer])
    memory.close()
    ring.close()
