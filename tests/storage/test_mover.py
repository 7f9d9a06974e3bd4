"""Transfers between real pools: each moves the right page and no other, whatever fails or takes long."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from support.disks import partial_files
from support.gated_pools import WAIT, GatedDevice, GatedDisk
from support.pages import SPEC, bits, load, random_page, same, store
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.storage.disk.disk_array import make_array
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.moving.mover import Mover
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, Transfer

DEVICE, HOST, DISK = Tier
ROUTES = [(DEVICE, HOST), (HOST, DEVICE), (HOST, DISK), (DISK, HOST)]
NUM_PAGES = 6


@dataclass
class Tiers:
    """Pools full of different pages; every method looks at the pools themselves."""

    device: GatedDevice
    host: HostPool
    disk: GatedDisk
    mover: Mover
    pages: dict[tuple[Tier, int], Tensor] = field(default_factory=dict)  # what must lie there

    def pool(self, tier: Tier) -> DevicePool | HostPool | DiskPool:
        return (self.device, self.host, self.disk)[tier]

    def start(self, *transfers: Transfer, await_ids: list[int] | None = None) -> None:
        """Starts transfers, which are to succeed."""
        for one in transfers:
            self.pages[one.target, one.target_slot] = self.pages[one.source, one.source_slot]
        self.mover.start(list(transfers), await_ids or [])

    def check(self) -> None:
        for (tier, slot), page in self.pages.items():
            assert same(load(self.pool(tier), slot), page), (tier, slot)


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    heads = DiskShare.of_all(SPEC)
    make_array(tmp_path, SPEC, NUM_PAGES)
    device = GatedDevice(SPEC, NUM_PAGES, CpuDevice())
    host, disk = HostPool(SPEC, NUM_PAGES, pinned=False), GatedDisk(SPEC, tmp_path, NUM_PAGES, heads)
    made = Tiers(device, host, disk, Mover(device, host, disk))
    for tier in Tier:
        for slot in range(NUM_PAGES):
            page = random_page(SPEC, 100 * tier + slot)
            store(made.pool(tier), slot, page)
            made.pages[tier, slot] = page
    yield made
    device.gate.set()
    disk.gate.set()
    made.mover.close()


def reported(mover: Mover) -> tuple[list[int], list[tuple[int, str]]]:
    ended = mover.report()
    return sorted(ended.done), sorted(ended.failed)


@pytest.mark.parametrize(("source", "target"), ROUTES)
def test_a_transfer_moves_its_page(tiers: Tiers, source: Tier, target: Tier) -> None:
    tiers.start(Transfer(0, source, 4, target, 1), await_ids=[0])
    tiers.check()
    moved = tiers.mover.report()
    assert (moved.done, moved.failed) == ([0], [])
    assert tiers.mover.bytes == {(source, target): SPEC.page_bytes}
    if target is DISK:
        page = bits(tiers.pages[DISK, 1]).reshape(SPEC.num_layers, 2, SPEC.num_kv_heads, -1)
        expected = [crc32c(layer[:, head].tobytes()) for head in range(SPEC.num_kv_heads) for layer in page]
        assert np.frombuffer(moved.checksums[0], np.uint32).tolist() == expected
    else:
        assert moved.checksums == {}
    assert reported(tiers.mover) == ([], [])


def test_many_transfers(tiers: Tiers) -> None:
    """All routes at once, over distinct slots; bytes add up."""
    tiers.start(
        *(Transfer(id, DEVICE, id, HOST, id) for id in range(2)),
        Transfer(2, HOST, 2, DEVICE, 3),
        Transfer(3, HOST, 3, DISK, 5),
        Transfer(4, HOST, 3, DISK, 4),
        Transfer(5, DISK, 0, HOST, 4),
        Transfer(6, DISK, 0, HOST, 5),
        await_ids=list(range(7)),
    )
    tiers.check()
    assert reported(tiers.mover) == (list(range(7)), [])
    size = SPEC.page_bytes
    assert tiers.mover.bytes == {route: size * (1 if route == (HOST, DEVICE) else 2) for route in ROUTES}


def test_the_same_plan_again_does_nothing(tiers: Tiers) -> None:
    transfers = [Transfer(0, DEVICE, 0, HOST, 0), Transfer(1, HOST, 1, DISK, 1), Transfer(2, DISK, 2, HOST, 2)]
    tiers.start(*transfers, await_ids=[0, 1, 2])
    assert reported(tiers.mover) == ([0, 1, 2], [])
    for tier, slot in [(HOST, 0), (DISK, 1), (HOST, 2)]:  # written since
        tiers.pages[tier, slot] = random_page(SPEC, 999)
        store(tiers.pool(tier), slot, tiers.pages[tier, slot])
    tiers.mover.start(transfers, [0, 1, 2])
    tiers.check()
    assert reported(tiers.mover) == ([], [])
    tiers.start(Transfer(3, HOST, 0, DEVICE, 5), await_ids=[3, 77])  # an id that is not on its way is passed over
    tiers.check()
    assert reported(tiers.mover) == ([3], [])


def test_what_is_not_waited_for_goes_on_beside_the_step(tiers: Tiers) -> None:
    tiers.device.gate.clear()
    tiers.disk.gate.clear()
    tiers.start(Transfer(0, DEVICE, 0, HOST, 0), Transfer(1, HOST, 1, DISK, 1), Transfer(2, DISK, 2, HOST, 2))
    tiers.start(await_ids=[2])
    assert reported(tiers.mover) == ([2], [])
    tiers.device.gate.set()
    tiers.start(await_ids=[0])
    assert reported(tiers.mover) == ([0], [])
    tiers.disk.gate.set()
    tiers.start(await_ids=[1])
    assert reported(tiers.mover) == ([1], [])
    tiers.check()


def test_copies_between_device_and_host_go_in_order(tiers: Tiers) -> None:
    """Each reads what the one before wrote."""
    tiers.device.gate.clear()
    chain = [Transfer(0, DEVICE, 0, HOST, 0), Transfer(1, HOST, 0, DEVICE, 5), Transfer(2, DEVICE, 5, HOST, 3)]
    tiers.start(*chain)
    tiers.device.gate.set()
    tiers.start(await_ids=[2])
    assert reported(tiers.mover) == ([0, 1, 2], [])
    tiers.check()
    assert same(load(tiers.host, 3), load(tiers.device, 0))


def test_disk_writes_begin_after_the_copies_that_are_waited_for(tiers: Tiers) -> None:
    """A copy fills the host page that goes to disk in the same plan."""
    tiers.device.gate.clear()
    copy, write = Transfer(0, DEVICE, 2, HOST, 2), Transfer(1, HOST, 2, DISK, 3)
    plan = threading.Thread(target=tiers.start, args=(copy, write), kwargs={"await_ids": [0]})
    plan.start()
    plan.join(0.2)  # a write that does not wait has run by now
    tiers.device.gate.set()
    plan.join(WAIT)
    tiers.start(await_ids=[1])
    assert reported(tiers.mover) == ([0, 1], [])
    tiers.check()
    assert same(load(tiers.disk, 3), load(tiers.device, 2))


def test_disk_reads_begin_after_the_copies_that_are_waited_for(tiers: Tiers) -> None:
    """A copy reads the host slot that a page from disk is to fill in the same plan."""
    tiers.device.gate.clear()
    copy, read = Transfer(0, HOST, 2, DEVICE, 2), Transfer(1, DISK, 3, HOST, 2)
    plan = threading.Thread(target=tiers.start, args=(copy, read), kwargs={"await_ids": [0]})
    plan.start()
    plan.join(0.2)
    tiers.device.gate.set()
    plan.join(WAIT)
    tiers.start(await_ids=[1])
    assert reported(tiers.mover) == ([0, 1], [])
    tiers.check()


def test_failures_come_with_their_reason(tiers: Tiers, tmp_path: Path) -> None:
    tiers.disk.refused = {1}
    path = tiers.disk.chunk_path(2, 1)
    path.unlink()
    before = load(tiers.disk, 1)
    tiers.mover.start([Transfer(0, HOST, 1, DISK, 1), Transfer(1, DISK, 2, HOST, 2)], [0, 1])
    del tiers.pages[HOST, 2], tiers.pages[DISK, 2]
    tiers.start(Transfer(2, HOST, 0, DISK, 0), Transfer(3, DISK, 3, HOST, 3), await_ids=[2, 3])
    moved = tiers.mover.report()
    assert sorted(moved.done) == [2, 3] and list(moved.checksums) == [2]
    missing = f"{path} cannot be read: No such file or directory"
    assert sorted(moved.failed) == [(0, "no room for slot 1"), (1, missing)]
    assert tiers.mover.bytes == {(HOST, DISK): SPEC.page_bytes, (DISK, HOST): SPEC.page_bytes}
    assert same(load(tiers.disk, 1), before)
    tiers.check()


def test_close_waits_for_what_is_on_its_way(tiers: Tiers, tmp_path: Path) -> None:
    tiers.disk.gate.clear()
    tiers.mover.start([Transfer(id, HOST, id, DISK, id) for id in range(NUM_PAGES)], [])
    closing = threading.Thread(target=tiers.mover.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    tiers.disk.gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert partial_files(tmp_path) == []
    assert reported(tiers.mover) == ([], [])


def test_without_a_disk() -> None:
    device, host = DevicePool(SPEC, 2, CpuDevice()), HostPool(SPEC, 2, pinned=False)
    page = random_page(SPEC, 0)
    device.store(0, page)
    mover = Mover(device, host, None)
    mover.start([Transfer(0, DEVICE, 0, HOST, 1)], [0])
    assert reported(mover) == ([0], [])
    assert same(load(host, 1), page)
    mover.close()
