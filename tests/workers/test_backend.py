"""What a kind of machine provides, and what follows from it elsewhere."""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distkv.kernels.page_entries import buffer_entry, buffer_index
from distkv.storage.device import CpuDevice, CudaDevice, device_of
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, Transfer, encode_location
from distkv.workers.backend import Demand, make_backend
from distkv.workers.errors import ConfigError
from distkv.workers.kinds import KINDS
from distkv.workers.kv_pools import KVPools
from distkv.workers.rank import Rank
from distkv.workers.runners.host_copies import map_arrays, send
from distkv.workers.sizes import PoolSizes


class Halved(PageSpec):
    """Pages that take half of their bytes on the host, and a quarter on disk."""

    def slice_bytes_in(self, tier: Tier) -> int:
        return self.layer_slice_bytes >> tier


SPEC = Halved(num_layers=3, num_kv_heads=2, page_size=16, head_dim=4, dtype="float32")


def test_every_kind_has_a_module() -> None:
    assert all(find_spec(kind.module) for kind in KINDS.values())
    assert isinstance(make_backend("cpu").device, CpuDevice)


def test_a_cpu_cannot_be_told_to_let_batch_mates_change_bits() -> None:
    assert make_backend("cpu", True).kernels.name == make_backend("cpu").kernels.name
    with pytest.raises(ConfigError, match="batch_invariant is False and this is a CPU"):
        make_backend("cpu", False)


def test_a_tensor_says_which_device_it_is_on() -> None:
    assert isinstance(device_of(torch.zeros(1).device), CpuDevice)
    assert isinstance(device_of(torch.device("cuda", 0)), CudaDevice)


def test_room_of_a_cpu_is_what_the_staging_ring_leaves() -> None:
    model: Any = None
    room = make_backend("cpu").room(model, Demand(SPEC, 1, 1, 300, 0.9, 1000))
    assert (room.num_bytes, room.page_bytes, room.budget) == (700, SPEC.page_bytes, [])


def test_memory_that_is_pinned_at_once_is_no_share_of_a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take minutes; a CPU takes its memory when it is used."""
    monkeypatch.setattr("distkv.workers.rank.available_bytes", lambda: 2**41)
    pages = []
    for pinned in (False, True):
        backend = SimpleNamespace(device=SimpleNamespace(pinned=pinned))
        rank: Any = SimpleNamespace(config=None, page_spec=SPEC, backend=backend)
        pages.append([Rank.page_capacity(rank, count, of_device=False).host for count in (1, 4)])
    size = SPEC.page_bytes_in(Tier.HOST)
    assert pages == [[2**39 // size, 2**37 // size], [2**35 // size, 2**33 // size]]


@pytest.mark.parametrize("runs_behind", [False, True])
def test_a_rank_whose_device_may_be_at_a_step_stays_open_after_an_error(runs_behind: bool) -> None:
    closed: list[bool] = []
    device = SimpleNamespace(runs_behind=runs_behind)
    rank: Any = SimpleNamespace(backend=SimpleNamespace(device=device), close=lambda: closed.append(True))
    Rank.close_after_error(rank)
    assert bool(closed) is not runs_behind


def test_bytes_are_those_of_each_tier() -> None:
    """Of the pools, of whole pages that are copied and of slices that stream."""
    assert [SPEC.page_bytes_in(tier) for tier in Tier] == [SPEC.page_bytes >> tier for tier in Tier]
    assert SPEC.route_bytes(Tier.DEVICE, Tier.HOST) == SPEC.route_bytes(Tier.HOST, Tier.DEVICE) == SPEC.page_bytes // 2
    assert SPEC.route_bytes(Tier.HOST, Tier.DISK) == SPEC.page_bytes // 4
    pools = KVPools(SPEC, PoolSizes(device=2, host=3), CpuDevice())
    assert pools.nbytes == (2 * SPEC.page_bytes, 3 * SPEC.page_bytes // 2, 0)
    pools.mover.start([Transfer(0, Tier.DEVICE, 1, Tier.HOST, 2)], [0])
    assert pools.take_report().bytes_moved == {"device_to_host": SPEC.page_bytes // 2}
    pools.close()
    host = HostPool(SPEC, 3, pinned=False)
    ring = StagingRing(SPEC, 2 * NUM_BUFFERS, host, None, None, CpuDevice())
    stream = ring.begin([[encode_location(Tier.HOST, 0), encode_location(Tier.HOST, 2)]])
    stream.take()
    stream.close()
    assert ring.bytes == Counter({Tier.HOST: 2 * SPEC.layer_slice_bytes // 2})


@dataclass(frozen=True)
class Inner:
    numbers: Any
    nothing: Any = None


@dataclass(frozen=True)
class Outer:
    first: Any
    inner: list[Inner]
    way: Any


def test_arrays_arrive_where_they_were() -> None:
    """In whatever dataclasses and lists they are; all else stays."""
    values = Outer(np.arange(3), [Inner(np.array([[0.5], [2.0]])), Inner(np.arange(0))], way=len)
    sent: Outer = send(values, CpuDevice())
    assert sent.first.tolist() == [0, 1, 2] and sent.way is len
    assert [one.numbers.tolist() for one in sent.inner] == [[[0.5], [2.0]], []]
    assert [one.nothing for one in sent.inner] == [None, None]
    assert send(np.array([7]), CpuDevice()).tolist() == [7]
    shapes: list[tuple[int, ...]] = []
    map_arrays(sent, lambda tensor: shapes.append(tuple(tensor.shape)))
    assert shapes == [(3,), (2, 1), (0,)]


def test_an_entry_of_a_buffer_is_negative() -> None:
    assert [buffer_index(buffer_entry(index)) for index in range(5)] == list(range(5))
    assert (buffer_entry(np.arange(5)) < 0).all()
