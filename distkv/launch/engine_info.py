"""What an engine is told of what the launch has fixed."""

from distkv.config import EngineConfig
from distkv.engine.protocol import EngineInfo
from distkv.errors import ConfigError
from distkv.planner.model_shape import attention_cost
from distkv.planner.sizing import cold_budget, cold_page_seconds, page_specs, shares_prefixes, summary_bytes
from distkv.storage.tier import Tier
from distkv.workers.attention.policies.policy import num_observed
from distkv.workers.attention.policies.registry import parse_policy
from distkv.workers.cache_place import CachePlace
from distkv.workers.kinds import KINDS
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import Bandwidth, PoolSizes


def engine_info(
    config: EngineConfig,
    ranks: RankConfig,
    place: CachePlace | None,
    max_model_len: int,
    sizes: PoolSizes,
    pool_bytes: list[tuple[int, int, int]],
    rates: list[Bandwidth],
    host_share: float = 0.0,
) -> EngineInfo:
    """What the engine is told.

    Args:
        place: of the disk tier; needed where that has pages.
        pool_bytes: of device, host and disk, for each rank, as allocated.
        rates: see `cold_budget`.
        host_share: see `sizing.host_share`.

    Raises ConfigError for a share of the device that is less than a page.
    """
    if config.max_share_per_salt is not None and config.max_share_per_salt * sizes.device < 1:
        raise ConfigError(
            f"max_share_per_salt {config.max_share_per_salt} of the {sizes.device} KV pages of the device is less than "
            "one; raise it, or device_kv_bytes"
        )
    specs = page_specs(ranks)
    max_cold_bytes, disk_cost = cold_budget(config, sizes, rates, host_share)
    on_device, on_host, on_disk = (sum(tier) for tier in zip(*pool_bytes, strict=True))
    return EngineInfo(
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.plan_page_size,
        context_size=config.decode_context_parallel_size,
        num_pages=sizes.device,
        num_host_pages=sizes.host,
        num_disk_pages=sizes.disk,
        page_bytes=sum(spec.page_bytes for spec in specs),
        coded_page_bytes=sum(spec.page_bytes_in(Tier.HOST) for spec in specs),
        pool_bytes=on_device,
        kv_bytes_per_token=sum(spec.page_bytes for spec in specs) // config.plan_page_size,
        vocab_size=ranks.model.vocab_size,
        eos_token_ids=ranks.model.eos_token_ids,
        seed=config.seed,
        cache_dir=str(place.folder) if place is not None and sizes.disk else None,
        fingerprint=place.fingerprint if place is not None and sizes.disk else "",
        enable_prefix_caching=shares_prefixes(config, ranks.model),
        write_through=config.disk_write_policy == "write_through",
        max_cold_bytes_per_step=max_cold_bytes,
        disk_cost=disk_cost,
        model=str(ranks.folder),
        tier_bytes=(on_device, on_host, on_disk),
        max_share_per_salt=config.max_share_per_salt,
        save_timeout=config.save_timeout,
        attention_policy=config.attention_policy,
        num_observed=num_observed(parse_policy(config.attention_policy)),
        kv_policy=_kv_policy(config, ranks, host_share),
        host_share=host_share,
        kv_cache_dtype=config.kv_cache_dtype,
        speculation=config.speculation,
        num_ranks=len(specs),
        attention_cost=attention_cost(ranks.model),
        cold_page_seconds=cold_page_seconds(specs, rates),
        summary_bytes=sizes.summaries * summary_bytes(ranks, specs),
    )


def _kv_policy(config: EngineConfig, ranks: RankConfig, host_share: float) -> str | None:
    """See `EngineConfig.kv_policy`; what a host attends to beside a device with other kernels has bits of its own."""
    parts = [] if config.kv_policy is None else [config.kv_policy]
    if host_share and not KINDS[ranks.device].has_bits_of_host:
        parts.append(f"cpu_attention={host_share:g}")
    return ", ".join(parts) or None
