"""Starts an engine from its options: reads the model's config, loads the ranks, has their pools allocated."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.engine.observer import StepObserver
from distkv.engine.protocol import EngineInfo
from distkv.engine.room import room_for
from distkv.errors import CapacityError, ConfigError
from distkv.launch.engine_info import engine_info
from distkv.launch.fewer_ranks import fewer_after, fewer_sizes, with_fewer
from distkv.launch.fingerprint import FOLDER_DIGITS, common_digest, common_kernels, make_fingerprint
from distkv.metrics.step_trace import StepTrace
from distkv.metrics.trace_file import TraceFile
from distkv.planner.draft import draft_config
from distkv.planner.ranks import layout_of, make_rank_config
from distkv.planner.sizing import host_share, keeps_cache, needs_bandwidth, needs_capacity, pool_sizes
from distkv.storage.disk.cache_folder import SCRATCH
from distkv.storage.paging import pages_for
from distkv.storage.process_limits import lack_of_memory
from distkv.workers.cache_place import CachePlace
from distkv.workers.group.local_group import LocalGroup
from distkv.workers.group.rank_group import RankGroup
from distkv.workers.kinds import KINDS
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard
from distkv.workers.rank import Loaded
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, Budget

if TYPE_CHECKING:  # they import ray
    from distkv.launch.ray_engine import RayEngine
    from distkv.workers.group.placement import Fewer

log = logging.getLogger(__name__)

HANG_SECONDS = 60.0  # `EngineConfig.hang_timeout` unless it is given


def launch(
    config: EngineConfig, check: Callable[[], None] = lambda: None, observer: StepObserver | None = None
) -> EngineClient:
    """An engine ready for requests: in this process with one rank and no cluster address, else on Ray.

    Args:
        check: called every now and then; what it raises ends the launch, and nothing of it is left.
        observer: is told how steps go; of an engine in this process alone.
    """
    model, max_model_len = check_config(config)
    trace = None if config.trace is None else TraceFile(Path(config.trace))
    assert observer is None or trace is None
    try:
        if config.is_on_ray:
            assert observer is None
            start = _launch_pool if config.data_parallel_size > 1 or config.max_rank_failures else _launch_on_ray
            return start(config, model, max_model_len, check, trace)
        group = LocalGroup(config.device, check)
        try:
            info = set_up(group, config, model, max_model_len)
            if trace is not None:
                observer = StepTrace(trace.write, trace.close)
            return Engine(info, group.make_executor(), group.close, observer=observer)
        except BaseException as error:
            group.close()
            if (lack := lack_of_memory(error)) is not None:
                raise CapacityError(lack) from error
            raise
    except BaseException:
        if trace is not None:
            trace.close()
        raise


def check_config(config: EngineConfig) -> tuple[ModelConfig, int]:
    """The model's config and the most positions a request may use. Raises ConfigError when the model's folder has none
    that can be used, or does not go with the options; nothing has started then."""
    model = ModelConfig.load(Path(config.model))
    max_model_len = _max_model_len(config, model)
    Shard.of(model, layout_of(config), 0)  # refuses too many ranks, or stages
    if config.cpu_attention != "off" and config.decode_context_parallel_size > 1:
        raise ConfigError(
            f"cpu_attention is set and decode_context_parallel_size is {config.decode_context_parallel_size}, whose "
            "ranks share out each page among themselves alone; leave one of them out"
        )
    draft_config(config, model)  # refuses one that does not go with the model
    fewer_sizes(config, model)  # refuses what the heads do not allow
    return model, max_model_len


def _launch_on_ray(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    check: Callable[[], None],
    trace: TraceFile | None,
    fewer: "Fewer | None" = None,
    in_pool: bool = False,
) -> "RayEngine":
    from distkv.launch.ray_engine import RayEngine
    from distkv.workers.group.ray_group import RayGroup

    size, num_parts = config.num_ranks, None
    stages = config.pipeline_parallel_size
    hang_timeout = HANG_SECONDS if config.hang_timeout is None else config.hang_timeout
    group = RayGroup(
        size, config.ray_address, config.device, check, config.data_parallel_size, fewer, stages, hang_timeout
    )
    try:
        if group.size < size:
            config, num_parts = with_fewer(config, group.size, group.device)
        info = set_up(group, config, model, max_model_len, num_parts)
        return RayEngine(group, info, trace, hang_timeout, leaves=not in_pool)
    except BaseException:
        group.close()
        raise


def _launch_pool(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    check: Callable[[], None],
    trace: TraceFile | None,
) -> EngineClient:
    from distkv.launch.pool import EnginePool
    from distkv.workers.group.placement import Fewer
    from distkv.workers.group.ray_cluster import connect, disconnect

    traces = [] if trace is None else [trace]
    sizes = fewer_sizes(config, model)
    fewer = Fewer(sizes, fewer_after(config)) if sizes else None

    def start(number: int, is_anew: bool, check: Callable[[], None]) -> "RayEngine":
        own = replace(config, cache_dir=engine_folder(config, number))
        if trace is not None and not traces:
            log.warning("the trace ends with the engine that was lost")
        return _launch_on_ray(
            own, model, max_model_len, check, traces.pop() if traces else None, fewer if is_anew else None, in_pool=True
        )

    # for longer than its engines, which come and go
    connect(config.ray_address, config.data_parallel_size * config.num_ranks)
    size, max_rank_failures = config.data_parallel_size, config.max_rank_failures or 0
    return EnginePool(start, size, max_rank_failures, config.seconds_to_rebuild, check, disconnect)


def engine_folder(config: EngineConfig, number: int) -> str | Path | None:
    """The cache folder of one of several engines, which cannot share one."""
    if config.cache_dir is None or config.data_parallel_size == 1:
        return config.cache_dir
    return Path(config.cache_dir) / f"engine-{number}"


def set_up(
    group: RankGroup, config: EngineConfig, model: ModelConfig, max_model_len: int, num_parts: int | None = None
) -> EngineInfo:
    """Has a group load the model and allocate its pools, and logs their sizes.

    Args:
        num_parts: see `Layout`.

    Raises CapacityError when a tier is too small to work with, ConfigError or StoreError when the checkpoint or the
    cache folder cannot be used, WorkerDied when a rank is lost.
    """
    ranks = make_rank_config(config, model, group.device)
    ranks = replace(ranks, layout=replace(ranks.layout, num_parts=num_parts))
    place = cache_place(config, ranks, group.load(ranks))
    capacity = group.capacity(config.device_kv_bytes is None) if needs_capacity(config) else None
    free_disk = None if place is None else group.free_disk_bytes(place.folder)
    sizes = pool_sizes(config, ranks, max_model_len, capacity, free_disk)
    pool_bytes = group.allocate(sizes, place)
    if capacity is not None and capacity.budget:
        log.info("%s", _budget_table(capacity.budget, sizes.device, config.gpu_memory_utilization))
    rates = group.bandwidth() if needs_bandwidth(config, sizes) else []
    if rates:
        host, disk = (min(getattr(rate, tier) for rate in rates) for tier in ("host", "disk"))
        from_disk = f", from disk at {disk / 1e9:.1f}" if disk else ""
        log.info("cold pages come from the host at %.1f GB/s%s, for each rank", host / 1e9, from_disk)
    share = host_share(config, ranks.device, max_model_len, sizes, rates)
    if share:
        log.info("cpu_attention: the CPU attends to %g of the pages that answers meet%s", share, _measured(rates))
    info = engine_info(config, ranks, place, max_model_len, sizes, pool_bytes, rates, share)
    if config.enable_prefix_caching and not info.enable_prefix_caching:
        log.warning(
            "prefix caching is off: with rope_type 'dynamic' the keys of a token depend on the length of its prompt, "
            "so prompts that begin alike do not share pages"
        )
    if config.kv_cache_dtype != "auto" and not sizes.host:
        log.warning(
            "kv_cache_dtype is %s and no page leaves the device, which holds all that max_num_seqs answers can need: "
            "none becomes smaller, and answers are not those of auto all the same; leave it out, or set host_kv_bytes",
            config.kv_cache_dtype,
        )
    _log_pools(info, pool_bytes)
    return info


def _measured(rates: list[Bandwidth]) -> str:
    if not rates:
        return ""
    return f", at {min(rate.cpu for rate in rates) / 1e9:.1f} GB/s for each rank"


def cache_place(config: EngineConfig, ranks: RankConfig, loaded: list[Loaded]) -> CachePlace | None:
    """Where the disk tier is to lie, if there is to be one.

    Args:
        loaded: what the ranks will run. Raises ConfigError when that is not one model.
    """
    weights = common_digest([one.digest for one in loaded], ranks.folder)
    names, stages = [one.kernels for one in loaded], ranks.layout.pipeline_parallel_size
    kernels = common_kernels(names, ranks.model.num_key_value_heads, stages)
    if config.cache_dir is None:
        return None
    cache_dir = Path(config.cache_dir).absolute()
    if not keeps_cache(config, ranks.model):
        return CachePlace(cache_dir / SCRATCH)
    if config.cpu_attention != "off" and not KINDS[ranks.device].has_bits_of_host:
        if config.cpu_attention == "auto":
            raise ConfigError(
                "cpu_attention is auto and cache_dir is set: pages that are kept have bits of their share, which is "
                "measured anew at each start; give cpu_attention as a number, or leave one of them out"
            )
        kernels = f"{kernels}, cpu attention {config.cpu_attention:g}"
    fingerprint = make_fingerprint(
        weights,
        kernels,
        ranks.model,
        ranks.dtype,
        ranks.page_size,
        ranks.kv_cache_dtype,
        ranks.disk_codec,
        ranks.layout.decode_context_parallel_size,
    )
    return CachePlace(cache_dir / fingerprint[:FOLDER_DIGITS], fingerprint, kernels)


def _log_pools(info: EngineInfo, pool_bytes: list[tuple[int, int, int]]) -> None:
    pages = info.num_pages, info.num_host_pages, info.num_disk_pages
    for tier, count, per_rank in zip(("device", "host", "disk"), pages, zip(*pool_bytes, strict=True), strict=True):
        log.info(
            "KV cache on %s: %d pages of %d tokens, %.3f GiB over %d rank(s); each rank holds %s GiB",
            tier, count, info.page_size, sum(per_rank) / 2**30, len(per_rank),
            ", ".join(f"{one / 2**30:.3f}" for one in per_rank),
        )  # fmt: skip
    if info.summary_bytes:
        log.info("summaries of pages, by which attention chooses: up to %.3f GiB", info.summary_bytes / 2**30)
    held = sum(pages) * info.page_size
    if held < info.max_model_len:
        log.warning(
            "the tiers hold %d tokens, less than max_model_len %d; a request that may need more is refused: %s",
            held, info.max_model_len, room_for(info, pages_for(info.max_model_len, info.page_size)),
        )  # fmt: skip


def _budget_table(budget: Budget, num_pages: int, utilization: float) -> str:
    """What the memory of the GPU with the least room is for."""
    rows = [f"GPU memory at gpu_memory_utilization {utilization:g}, GiB:"]
    rows += [f"  {size / 2**30:8.3f}  {name}" for name, size in budget]
    return "\n".join([*rows, f"  {num_pages:8d}  KV pages taken of it"])


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The most positions a request may use."""
    limit = model.most_positions
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit and config.load_format != "dummy":
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {limit} positions that the model was made for; "
            f"use at most {limit}"
        )
    return config.max_model_len
