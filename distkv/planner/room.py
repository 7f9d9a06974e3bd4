"""What would make room for all requests: memory below the devices, or more ranks."""

from dataclasses import replace
from typing import Any, Literal

from distkv.errors import ConfigError
from distkv.option_checks import MOST_BYTES
from distkv.planner.fit import find_fit
from distkv.planner.request import PlanRequest
from distkv.planner.units import rounded_up

MOST_RANKS = 64  # that are tried
CODECS = "int8", "int4"  # that are tried; fp8_e4m3 takes as much as the first
TRIALS = 8  # the staging ring and what reads ahead take some of what is added


def enough_below(request: PlanRequest, tier: Literal["host", "disk"]) -> PlanRequest | None:
    """The request with as much memory in one tier, "host" or "disk", as holds all of its requests; None where nothing
    there helps, since the devices hold too little to work with, or more than an option may say."""
    for _ in range(TRIALS):
        fit = find_fit(request)
        if fit.running == request.concurrency:
            return request
        lacking = request.concurrency * fit.pages_per_request - sum(one.pages for one in fit.tiers)
        if not fit.tiers[0].pages or request.num_seqs < request.concurrency or lacking <= 0:
            return None
        now, room = (request.host_kv_bytes, fit.tiers[1]) if tier == "host" else (request.disk_kv_bytes, fit.tiers[2])
        enough = rounded_up(now + lacking * room.page_bytes)
        if enough > MOST_BYTES:  # than an option may be
            return None
        changed: dict[str, Any] = {f"{tier}_kv_bytes": enough}
        request = replace(request, **changed)
    return None


def fewest_ranks(request: PlanRequest, fit_all: bool = False) -> int | None:
    """The fewest ranks, of twice as many and twice that, with which a page fits on the devices, or all requests there;
    None when none do."""
    size = request.tensor_parallel_size
    while size < MOST_RANKS:
        size *= 2
        try:
            fit = find_fit(request.on_devices_alone(tensor_parallel_size=size))
        except ConfigError:  # more ranks than heads
            return None
        if fit.running == request.concurrency if fit_all else fit.tiers[0].pages:
            return size
    return None


def codec_that_fits(request: PlanRequest) -> str | None:
    """The codec of the most bits with which all requests fit into the tiers that there are; None where none makes room,
    since no page leaves the devices."""
    if not request.host_kv_bytes or request.kv_cache_dtype != "auto":
        return None
    for name in CODECS:
        try:
            fit = find_fit(replace(request, kv_cache_dtype=name))
        except ConfigError:  # a head_dim that codes do not go with
            return None
        if fit.running == request.concurrency:
            return name
    return None
