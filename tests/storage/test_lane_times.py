"""What lanes of a device have taken is told once it has ended, and nobody waits for that."""

import random

from support.simulated_device import SimulatedDevice

from distkv.storage.meter import Measures, Meter
from distkv.storage.moving.lane_times import LaneTimes
from distkv.storage.moving.streams import Lane


def test_work_is_told_when_it_has_ended() -> None:
    device, meter = SimulatedDevice(random.Random(1)), Meter()
    times = LaneTimes(device, meter)
    begun = times.begin(Lane.FETCH)
    ended = times.end(Lane.FETCH, begun, "host_to_device", pages=2)
    times.collect()
    assert meter.take() == Measures() and device.num_host_waits == 0
    ended.synchronize()
    later = times.end(Lane.SPILL, times.begin(Lane.SPILL), "device_to_host")
    times.collect()
    assert meter.take().nanoseconds == {"host_to_device": 1000}
    later.synchronize()
    times.collect()
    times.collect()
    assert meter.take().nanoseconds == {"device_to_host": 1000}


def test_a_trace_shows_it_on_its_lane() -> None:
    device, meter = SimulatedDevice(random.Random(1)), Meter(rank=3, traces=True)
    times = LaneTimes(device, meter)
    for lane in (Lane.LOAD, Lane.COMPUTE):
        times.end(lane, times.begin(lane), lane.name, pages=2)
    device.synchronize()
    times.collect()
    taken = meter.take()
    load, compute = taken.spans
    assert taken.nanoseconds == {"LOAD": 1000}, "computing is not moving"
    assert (load.rank, load.track, load.duration, load.details) == (3, Lane.LOAD.value, 1000, {"pages": 2})
    assert compute.track == Lane.COMPUTE.value and compute.start == load.start + 1000
