"""The smallest setup that reaches a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distkv.errors import ConfigError
from distkv.option_checks import check_amount
from distkv.planner.hardware import Hardware
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest
from distkv.planner.room import enough_below

LEAST_BYTES = 2**30  # of disk that are tried first, and of the host


@dataclass(frozen=True)
class Solution:
    """The smallest setup of one kind of hardware that reaches the target, or how near the nearest comes."""

    plan: Plan
    reached: bool
    price_per_hour: float | None  # of all its GPUs

    @property
    def price_per_million_tokens(self) -> float | None:
        """Of tokens that are generated while all requests run."""
        rate = self.plan.tokens_per_second
        return None if rate is None or self.price_per_hour is None else self.price_per_hour / 3600 / rate * 1e6


def solve(
    target: PlanRequest,
    hardware: Sequence[Hardware],
    sizes: Sequence[int],
    seconds_per_token: float | None,
    prices: Mapping[str, float],
) -> list[Solution]:
    """For each kind of hardware the smallest setup with which all requests of the target run and a step takes no longer
    than `seconds_per_token`; the best first: the cheapest where there are prices, else that of the fewest GPUs, and of
    these with the least memory. Kinds with which the target is out of reach come last, by how near they come.

    Memory below the devices is taken where it is needed, as little as is enough, within the `host_kv_bytes` and
    `disk_kv_bytes` of the target.

    Args:
        sizes: numbers of GPUs that may share the model.
        prices: of one GPU and hour, by `Hardware.name`; all kinds must have one, or none. Raises ConfigError.
    """
    if seconds_per_token is not None:
        check_amount("the target of a step, in seconds,", seconds_per_token)
    unpriced = [one.name for one in hardware if one.name not in prices]
    if prices and unpriced:
        raise ConfigError(
            f"there is no price per hour for {', '.join(unpriced)}; give one, or name the others with --gpu"
        )
    found = []
    for one in hardware:
        tried = (1,) if one.is_cpu else sizes  # ranks would share its cores and its memory
        plans = [plan for size in tried for plan in _setups(replace(target, hardware=one), size)]
        if plans:
            best = min(plans, key=lambda plan: _key(plan, seconds_per_token))
            price = prices[one.name] * best.request.tensor_parallel_size if prices else None
            found.append(Solution(best, _reaches(best, seconds_per_token), price))

    def place(one: Solution) -> tuple[float, ...]:
        price = one.price_per_hour if one.reached else None  # what comes nearest is wanted of the others
        return (not one.reached, price or 0.0, *_key(one.plan, seconds_per_token))

    return sorted(found, key=place)


def _setups(target: PlanRequest, size: int) -> list[Plan]:
    """Plans for this number of GPUs: without memory below them, with some of the host, and with some of the disk."""
    try:
        devices = target.on_devices_alone(tensor_parallel_size=size)
    except ConfigError:  # more ranks than query heads
        return []
    plans = [make_plan(devices)]
    if target.host_kv_bytes:
        whole_host = replace(target, tensor_parallel_size=size, disk_kv_bytes=0)
        least = 0 if target.kv_cache_dtype == "auto" else min(LEAST_BYTES, target.host_kv_bytes)  # for codes
        plans.append(_least(replace(whole_host, host_kv_bytes=least), whole_host, "host"))
        if target.disk_kv_bytes and not plans[-1].fits:
            some_disk = replace(whole_host, disk_kv_bytes=min(LEAST_BYTES, target.disk_kv_bytes))
            plans.append(_least(some_disk, replace(whole_host, disk_kv_bytes=target.disk_kv_bytes), "disk"))
    return plans


def _least(first: PlanRequest, most: PlanRequest, tier: Literal["host", "disk"]) -> Plan:
    """A plan with as much memory in one tier as all requests need, from that of `first` on; with all that may be taken
    where so much, in round figures, is more, or not enough."""
    found, option = enough_below(first, tier), f"{tier}_kv_bytes"
    is_within = found is not None and getattr(found, option) <= getattr(most, option)
    return make_plan(found if found is not None and is_within else most)


def _reaches(plan: Plan, seconds_per_token: float | None) -> bool:
    if not plan.fits or plan.decode is None:
        return False
    return seconds_per_token is None or plan.decode.seconds <= seconds_per_token


def _key(plan: Plan, seconds_per_token: float | None) -> tuple[float, ...]:
    """Smaller is better: what reaches the target before what does not, and that by how near it comes; then fewer GPUs,
    less memory on them, less on the host and on disk."""
    request, reached = plan.request, _reaches(plan, seconds_per_token)
    size = request.tensor_parallel_size
    seconds = float("inf") if plan.decode is None else plan.decode.seconds
    miss = (0.0, 0.0) if reached else (float(request.concurrency - plan.fit.running), seconds)
    memory = size * request.hardware.memory_bytes
    return (not reached, *miss, size, memory, request.disk_kv_bytes, request.host_kv_bytes)
