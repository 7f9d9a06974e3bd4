"""Which options of an engine have no effect beside the others."""

from typing import Any

from distkv.errors import ConfigError
from distkv.workers.attention.policies.registry import FULL


def check_effects(config: Any) -> None:
    """Raises ConfigError for an option of an `EngineConfig`, which imports this module, that nothing would come of."""
    no_disk, no_cold = config.cache_dir is None, config.host_kv_bytes == 0
    policy, codec = config.disk_write_policy, config.disk_kv_codec
    no_pages = "host_kv_bytes is 0, so that no page leaves the device"
    not_rebuilt = "max_rank_failures is not, so that no lost engine is started anew", "set both, or leave it out"
    for name, is_idle, why, cure in (
        ("max_rank_failures", not config.is_on_ray, "the ranks are not on Ray", "set ray_address, or leave it out"),
        ("hang_timeout", not config.is_on_ray, "the ranks are not on Ray", "set ray_address, or leave it out"),
        ("rebuild_timeout", not config.max_rank_failures, *not_rebuilt),
        ("min_tensor_parallel_size", not config.max_rank_failures, *not_rebuilt),
        (
            "min_tensor_parallel_size", config.pipeline_parallel_size > 1,
            "pipeline_parallel_size is more than 1, which takes all ranks of each stage", "leave one of them out",
        ),
        ("trace", config.data_parallel_size > 1, "data_parallel_size is more than 1", "trace a single engine"),
        (
            "max_prompt_tokens",
            config.max_model_len is not None and (config.max_prompt_tokens or 0) >= config.max_model_len,
            f"max_model_len is {config.max_model_len}, which no prompt may reach", "lower it, or leave it out",
        ),
        ("link_bytes_per_second", config.device != "simulated", "device is not simulated", "set both, or leave it out"),
        ("max_share_per_salt", config.max_share_per_salt == 1, "1 is no limit", "lower it, or leave it out"),
        ("max_sessions", no_disk, "cache_dir is not, where they are kept", "name the folder in cache_dir"),
        ("max_session_bytes", no_disk, "cache_dir is not, where they are kept", "name the folder in cache_dir"),
        ("disk_kv_bytes", no_disk, "cache_dir is not", "name the folder in cache_dir"),
        ("disk_write_policy", no_disk and policy == "idle", "cache_dir is not", "name the folder in cache_dir"),
        (
            "disk_kv_codec", codec != "none" and config.kv_cache_dtype != "auto",
            "kv_cache_dtype is too, whose codes would hardly become smaller", "leave one of them out",
        ),
        ("disk_kv_codec", no_disk and codec != "none", "cache_dir is not", "name the folder in cache_dir"),
        (
            "disk_write_policy", policy == "idle" and not config.enable_prefix_caching,
            "enable_prefix_caching is off, so that no page is written for later requests", "leave one of them out",
        ),
        ("save_timeout", no_disk, "cache_dir is not", "name the folder in cache_dir"),
        (
            "save_timeout", not config.enable_prefix_caching,
            "enable_prefix_caching is off, so that no page is written for later processes", "leave one of them out",
        ),
        ("kv_cache_dtype", no_cold and config.kv_cache_dtype != "auto", no_pages, "leave one of them out"),
        (
            "attention_policy", config.device == "simulated" and config.attention_policy != FULL,
            "device is simulated, which attends to all pages", "leave one of them out",
        ),
        ("attention_audit", config.attention_policy == FULL, "attention_policy is full", "set both, or leave it out"),
        ("cpu_attention", no_cold and config.cpu_attention != "off", no_pages, "leave one of them out"),
        (
            "cpu_attention", config.cpu_attention != "off" and config.attention_policy != FULL,
            f"attention_policy is {config.attention_policy}, by which few pages are read", "leave one of them out",
        ),
        ("staging_pages", no_cold, no_pages, "leave one of them out"),
        ("max_cold_bytes_per_step", no_cold, no_pages, "leave one of them out"),
        (
            "gpu_memory_utilization",
            config.gpu_memory_utilization != type(config).gpu_memory_utilization and config.device_kv_bytes is not None,
            "device_kv_bytes is too, which says how much memory KV takes", "leave one of them out",
        ),
    ):  # fmt: skip
        if is_idle and getattr(config, name) is not None:
            raise ConfigError(f"{name} is set and {why}; {cure}")
