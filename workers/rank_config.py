"""What every rank of a group has to know."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from distkv.storage.page_spec import PageSpec
from distkv.workers.attention.policies.registry import FULL
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard


@dataclass(frozen=True)
class DraftConfig:
    """A small model that drafts, on rank 0."""

    folder: Path
    model: ModelConfig
    num_pages: int  # of its own cache


@dataclass(frozen=True)
class RankConfig:
    """What every rank has to know; the same for all of them."""

    folder: Path
    model: ModelConfig
    load_format: str  # "auto" for safetensors, or "dummy"
    seed: int  # of dummy weights
    dtype: str  # one of `DTYPES`
    kv_cache_dtype: str  # "auto", or a key of `FORMATS`
    device: str  # a key of `KINDS`
    page_size: int  # tokens that a rank keeps of a page, see `plan_page_size`
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float  # share of the GPU's memory that weights, workspace and KV may take together
    num_threads: int | None  # torch's CPU threads; None leaves them as they are, as far as there are cores for them
    staging_pages: int  # see `StagingRing`
    batch_invariant: bool | None  # see `EngineConfig`
    digest_weights: bool  # whether pages may be kept, so that the whole content of the weights must be known
    traces: bool = False  # whether reports tell of each piece of work by itself
    disk_codec: str = "none"  # see `EngineConfig.disk_kv_codec`
    attention_policy: str = FULL  # see `parse_policy`
    attention_audit: int | None = None  # see `EngineConfig`
    draft: DraftConfig | None = None
    layout: Layout = field(default_factory=Layout)
    link_bytes_per_second: int | None = None  # of a kind that is simulated
    cpu_attention: bool = False  # whether plans may say that pages are the host's to attend to

    @property
    def plan_page_size(self) -> int:
        """Tokens of a page as the leader and its plans have it: each rank of a context group keeps `page_size` of
        them."""
        return self.page_size * self.layout.decode_context_parallel_size


def model_page_spec(
    model: ModelConfig, page_size: int, dtype: str, kv_cache_dtype: str = "auto", disk_codec: str = "none"
) -> PageSpec:
    """The pages of a whole model: all layers, all KV heads. Raises ConfigError for a codec that it cannot have."""
    return PageSpec(
        model.num_hidden_layers, model.num_key_value_heads, page_size, model.head_dim, dtype, kv_cache_dtype, disk_codec
    )


def rank_page_spec(config: RankConfig, shard: Shard) -> PageSpec:
    """The pages of one rank: its layers and KV heads."""
    whole = model_page_spec(config.model, config.page_size, config.dtype, config.kv_cache_dtype, config.disk_codec)
    return replace(whole, num_layers=shard.num_layers, num_kv_heads=shard.num_kv_heads)
