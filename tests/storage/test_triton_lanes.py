"""Whole pages between host and device by the kernels of a codec, on a device that is simulated."""

import random

import pytest
import torch
from support.coded_pages import bits, some_pages
from support.simulated_device import SimulatedDevice, SimulatedMemory

from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.page_codec import decode, encode
from distkv.storage.moving.mover import Mover
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, Transfer

pytestmark = pytest.mark.interpreter


def test_pages_are_codes_on_the_host() -> None:
    spec = PageSpec(3, 2, 16, 64, "float16", "int4")
    assert spec.format is not None
    lanes = SimulatedDevice(random.Random(0))
    memory = SimulatedMemory(lanes)
    device, host = DevicePool(spec, 5, memory, CudaCodec(spec.format, 2, 16, 64)), HostPool(spec, 4, pinned=False)
    pages = some_pages(1, torch.float16, 16, 64, 5, 3, size=0.01)  # [slot, layer, 2, ...]
    device.data.copy_(pages.permute(1, 2, 0, 3, 4, 5))
    mover = Mover(device, host, None, memory.make_copies())
    mover.start([Transfer(0, Tier.DEVICE, 4, Tier.HOST, 1), Transfer(1, Tier.DEVICE, 0, Tier.HOST, 3)], [0, 1])
    mover.start([Transfer(2, Tier.HOST, 1, Tier.DEVICE, 2)], [2])
    lanes.synchronize()
    assert not lanes.errors and sorted(mover.report().done) == [0, 1, 2]
    rounded = decode(encode(pages, spec.format), spec.format, torch.float16, 64)
    for slot, source in ((1, 4), (3, 0)):
        assert torch.equal(bits(decode(host.page(slot), spec.format, torch.float16, 64)), bits(rounded[source]))
    assert torch.equal(bits(device.data[:, :, 2]), bits(rounded[4]))
    assert mover.bytes[Tier.DEVICE, Tier.HOST] == 2 * host.page(0).nbytes
    mover.close()
