"""Statistics of an engine, gathered from its parts."""

import msgspec

from distkv.engine.protocol import EngineInfo
from distkv.engine.scheduler import Scheduler
from distkv.engine.stats import EngineStats, PolicyStats, SpeculationStats, TierStats
from distkv.engine.step_runner import StepRunner
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import Tier


def engine_stats(
    info: EngineInfo,
    scheduler: Scheduler,
    runner: StepRunner,
    *,
    peak_pages: int,
    num_recomputed: int,
    num_preemptions: int,
) -> EngineStats:
    """The state between two steps; for the numbers that are given see `EngineStats`."""
    cache, measures = scheduler.cache, runner.measures
    device, host, disk = cache.slots
    seconds = {kind: count / 1e9 for kind, count in measures.nanoseconds.items()}
    read_seconds, write_seconds, stage_seconds, stage_wait_seconds, _ = (
        seconds.pop(kind, 0.0) for kind in ("disk_read", "disk_write", "stage_step", "stage_wait", "compute")
    )
    return EngineStats(
        pages_in_use=cache.num_pages,
        peak_pages_in_use=peak_pages,
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_parked=sum(sequence.is_parked for sequence in scheduler.running),
        num_lacking_room=sum(sequence.lacks_room for sequence in scheduler.running),
        idle_pages=cache.num_idle,
        device_pages=device.num_used,
        host_pages=host.num_used,
        disk_pages=disk.num_used,
        tiers={tier.name.lower(): _tier_stats(tier, info, cache) for tier in Tier},
        bytes_moved=dict(runner.bytes_moved),
        seconds_moved=seconds,
        disk_read_bytes=measures.num_bytes.get("disk_read", 0),
        disk_read_seconds=read_seconds,
        disk_written_bytes=measures.num_bytes.get("disk_write", 0),
        disk_write_seconds=write_seconds,
        checksum_failures=measures.checksum_failures,
        stage_seconds=stage_seconds,
        stage_wait_seconds=stage_wait_seconds,
        pipeline_steps=int(measures.counts.get("pipeline_steps", 0)),
        micro_batches=int(measures.counts.get("micro_batches", 0)),
        pages_recomputed=num_recomputed,
        pages_to_save=cache.num_to_save,
        num_preemptions=num_preemptions,
        requests=scheduler.meter.stats(),
        speculation=SpeculationStats() if scheduler.speculator is None else scheduler.speculator.stats,
        policy=msgspec.convert(measures.counts, PolicyStats, strict=False),
    )


def _tier_stats(tier: Tier, info: EngineInfo, cache: TieredCache) -> TierStats:
    num_pages = (info.num_pages, info.num_host_pages, info.num_disk_pages)[tier]
    used, capacity = cache.slots[tier].num_used, info.tier_bytes[tier]
    used_bytes = used * capacity // num_pages if num_pages else 0
    return TierStats(num_pages, used, cache.num_idle_in(tier), capacity, used_bytes)
