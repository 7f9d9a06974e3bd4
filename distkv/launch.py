"""Starts an engine from its options: reads the model's config, settles the sizes, and loads the ranks."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distkv.config import EngineConfig
from distkv.engine import Engine
from distkv.errors import CapacityError, ConfigError
from distkv.messages import EngineInfo
from distkv.workers.model_config import ModelConfig, parse_dtype
from distkv.workers.process_group import ProcessGroup
from distkv.workers.rank import Rank, RankConfig, rank_page_spec
from distkv.workers.shard import Shard

if TYPE_CHECKING:
    from distkv.llm import EngineClient

log = logging.getLogger(__name__)


def launch(config: EngineConfig) -> "EngineClient":
    """An engine ready for requests: in this process with one rank and no cluster address, else on Ray."""
    model = ModelConfig.load(Path(config.model))
    max_model_len = _max_model_len(config, model)
    for rank in range(config.tensor_parallel_size):
        Shard.of(model, rank, config.tensor_parallel_size)  # refuses too many ranks before anything starts
    if config.tensor_parallel_size > 1 or config.ray_address is not None:
        from distkv.ray_engine import RayEngine  # imports ray

        return RayEngine(config, model, max_model_len)
    rank_config = make_rank_config(config, model, _local_device(config.device))
    local = Rank(rank_config, ProcessGroup())
    capacity = local.page_capacity(ranks_on_node=1) if config.device_kv_bytes is None else 0
    info = make_engine_info(config, rank_config, max_model_len, capacity, lambda pages: [local.allocate(pages)])
    return Engine(info, local.execute)


def make_rank_config(config: EngineConfig, model: ModelConfig, device: str) -> RankConfig:
    """What the ranks have to know, for a device that has been chosen."""
    return RankConfig(
        folder=Path(config.model).absolute(),
        model=model,
        load_format=config.load_format,
        seed=config.seed,
        dtype=model.dtype if config.dtype == "auto" else parse_dtype(config.dtype),
        device=device,
        page_size=config.page_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_threads=config.num_threads,
    )


def make_engine_info(
    config: EngineConfig, ranks: RankConfig, max_model_len: int, capacity: int, allocate: Callable[[int], list[int]]
) -> EngineInfo:
    """Settles the size of the device pool, has it allocated, and logs it.

    Args:
        capacity: pages that fit on the rank with the least room; of no account when device_kv_bytes is set.
        allocate: makes pools of so many pages on all ranks and returns the bytes that each takes.

    Raises CapacityError when device_kv_bytes is less than a page.
    """
    size = config.tensor_parallel_size
    specs = [rank_page_spec(ranks, Shard.of(ranks.model, rank, size)) for rank in range(size)]
    page_bytes = sum(spec.page_bytes for spec in specs)
    pages = capacity
    if config.device_kv_bytes is not None:
        assert isinstance(config.device_kv_bytes, int)
        pages = config.device_kv_bytes // page_bytes
        if pages < 1:
            raise CapacityError(
                f"device_kv_bytes {config.device_kv_bytes} is less than one page of {config.page_size} tokens, "
                f"{page_bytes} bytes over all ranks; raise it or lower page_size"
            )
    pages = min(pages, config.max_num_seqs * specs[0].pages_for(max_model_len))
    pool_bytes = allocate(pages)
    info = EngineInfo(
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.page_size,
        num_pages=pages,
        page_bytes=page_bytes,
        pool_bytes=sum(pool_bytes),
        kv_bytes_per_token=sum(spec.bytes_per_token for spec in specs),
        vocab_size=ranks.model.vocab_size,
        eos_token_ids=ranks.model.eos_token_ids,
        seed=config.seed,
    )
    log.info(
        "KV cache: %d pages of %d tokens, %.2f GiB over %d rank(s); each rank holds %s GiB",
        pages, config.page_size, sum(pool_bytes) / 2**30, size,
        ", ".join(f"{size / 2**30:.2f}" for size in pool_bytes),
    )  # fmt: skip
    if pages * config.page_size < max_model_len:
        log.warning(
            "the device pool holds %d tokens, less than max_model_len %d; a request that may need more is refused",
            pages * config.page_size, max_model_len,
        )  # fmt: skip
    return info


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The most positions a request may use."""
    stretch = model.rope.factor if model.rope.rope_type in ("linear", "dynamic") else 1
    limit = int(model.max_position_embeddings * stretch)
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit and config.load_format != "dummy":
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {limit} positions that the model was made for; "
            f"use at most {limit}"
        )
    return config.max_model_len


def _local_device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda' and torch sees no CUDA device; use device='cpu' or install a CUDA build of torch"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
