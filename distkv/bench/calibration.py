"""The rates of a machine from the times of decode steps: the formulas of `planner/roofline.py` the other way round."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from distkv.planner.hardware import Hardware
from distkv.planner.plan import make_plan
from distkv.planner.request import PlanRequest
from distkv.planner.roofline import DISK, KV, LINK, WEIGHTS

MOST_RATE = 1e13  # bytes per second, for a part whose time cannot be told from none
LEAST_SECONDS = 1e-6

Times = Mapping[tuple[str, int], float]
"""Seconds of a decode step by tier and context."""
MakeRequest = Callable[[str, int, Hardware], PlanRequest]
"""The request of a plan for tier, context and hardware."""


def calibrated(hardware: Hardware, request: MakeRequest, times: Times) -> Hardware:
    """A CPU on which plans take as long as steps took, at two contexts for each tier.

    What the longer context takes more on the device tells how fast attention reads KV, and the rest of the shorter one
    is what every step takes: the weights at the rate that `hardware` has, and fixed work. What host and disk take more
    than the device at the same contexts tells their rates, by least squares.

    Args:
        times: for "device", "host" and "disk", each at the same two contexts.
    """
    short, long = sorted({context for _, context in times})
    first, second = (_bytes(request, ("device", context), hardware) for context in (short, long))
    slope = (times["device", long] - times["device", short]) / (second[KV] - first[KV])
    attention = 1 / max(slope, 1 / MOST_RATE)
    fixed = max(LEAST_SECONDS, times["device", short] - first[KV] / attention)
    weights = min(first[WEIGHTS] / hardware.memory_bandwidth, fixed)
    found = replace(
        hardware, attention_bandwidth=attention, memory_bandwidth=first[WEIGHTS] / weights,
        step_seconds=fixed - weights, host_link=MOST_RATE, disk_bandwidth=MOST_RATE,
    )  # fmt: skip
    found = replace(found, host_link=_rate_below(request, "host", LINK, times, found))
    return replace(found, disk_bandwidth=_rate_below(request, "disk", DISK, times, found))


def _rate_below(request: MakeRequest, tier: str, part: str, times: Times, hardware: Hardware) -> float:
    """Bytes per second of a tier; `hardware` has the other rates, and MOST_RATE in place of this one."""
    moved, more = [], []
    for (name, context), seconds in times.items():
        if name == tier:
            plan = make_plan(request(tier, context, hardware)).decode
            assert plan is not None
            moved.append(plan.parts[part] * MOST_RATE)
            more.append(seconds - (plan.seconds - plan.parts[part]))
    slope = sum(count * one for count, one in zip(moved, more, strict=True)) / sum(count**2 for count in moved)
    return 1 / max(slope, 1 / MOST_RATE)


def _bytes(request: MakeRequest, key: tuple[str, int], hardware: Hardware) -> dict[str, float]:
    """What a step reads of weights and KV: its parts at a byte per second."""
    unit = replace(hardware, memory_bandwidth=1.0, attention_bandwidth=1.0)
    decode = make_plan(request(*key, unit)).decode
    assert decode is not None
    return decode.parts
