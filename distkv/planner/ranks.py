"""What the ranks of an engine are told, from its options: the launch and a planner say the same."""

from pathlib import Path

from distkv.config import EngineConfig
from distkv.planner.draft import draft_config
from distkv.planner.sizing import keeps_cache, staging_pages
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import RankConfig


def layout_of(config: EngineConfig) -> Layout:
    """How the ranks share out model and cache."""
    return Layout(config.tensor_parallel_size, config.pipeline_parallel_size, config.decode_context_parallel_size)


def make_rank_config(config: EngineConfig, model: ModelConfig, device: str) -> RankConfig:
    """What the ranks have to know, for a device that has been chosen."""
    return RankConfig(
        folder=Path(config.model).absolute(),
        model=model,
        load_format=config.load_format,
        seed=config.seed,
        dtype=model.run_dtype(config.dtype),
        kv_cache_dtype=config.kv_cache_dtype,
        device=device,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_threads=config.num_threads,
        staging_pages=staging_pages(config, device),
        batch_invariant=config.batch_invariant,
        digest_weights=keeps_cache(config, model),
        traces=config.trace is not None,
        disk_codec=config.disk_kv_codec,
        attention_policy=config.attention_policy,
        attention_audit=config.attention_audit,
        draft=draft_config(config, model),
        layout=layout_of(config),
        cpu_attention=config.cpu_attention != "off",
        link_bytes_per_second=None if config.link_bytes_per_second is None else int(config.link_bytes_per_second),
    )
