"""Starts an engine from its options: reads the model's config, settles the sizes, and loads the ranks."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo
from distkv.errors import CapacityError, ConfigError
from distkv.launch.fingerprint import FOLDER_DIGITS, dummy_digest, make_fingerprint, weights_digest
from distkv.storage.disk.cache_folder import ARRAY, SCRATCH
from distkv.storage.ledger.tiered_cache import MAX_DISK_WRITES
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS, pages_for
from distkv.storage.tier import Tier
from distkv.workers.backend import KINDS
from distkv.workers.bandwidth import Bandwidth
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.group.report import Report, ReportCollector
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.kv_pools import PoolSizes
from distkv.workers.model.model_config import ModelConfig, parse_dtype
from distkv.workers.model.shard import Shard
from distkv.workers.rank import Budget, Capacity, Rank, RankConfig, rank_page_spec

log = logging.getLogger(__name__)

KEPT_PAGES = 2**18  # most pages of a disk tier that outlives the engine, unless a size is given: each takes memory here
STREAM_SECONDS = 1.0  # what a step may spend on cold pages, unless a number of bytes is given


def launch(config: EngineConfig) -> EngineClient:
    """An engine ready for requests: in this process with one rank and no cluster address, else on Ray."""
    model = ModelConfig.load(Path(config.model))
    max_model_len = _max_model_len(config, model)
    for rank in range(config.tensor_parallel_size):
        Shard.of(model, rank, config.tensor_parallel_size)  # refuses too many ranks before anything starts
    if config.tensor_parallel_size > 1 or config.ray_address is not None:
        from distkv.launch.ray_engine import RayEngine  # imports ray

        return RayEngine(config, model, max_model_len)
    rank_config = make_rank_config(config, model, _local_device(config.device))
    local = Rank(rank_config, ProcessGroup())
    reports = ReportCollector(num_ranks=1)

    def execute(plan: StepPlan, drawn: torch.Tensor | None) -> tuple[torch.Tensor | None, Report]:
        logits = local.execute(plan, drawn)
        return logits, reports.add([local.take_report()])

    try:
        capacity = local.page_capacity(1, config.device_kv_bytes is None) if needs_capacity(config) else None
        info = make_engine_info(
            config, rank_config, max_model_len, capacity, lambda sizes: [local.allocate(sizes)],
            lambda: [local.bandwidth()],
        )  # fmt: skip
        return Engine(info, execute, local.close, warm_up=local.warm_up)
    except BaseException:
        local.close()
        raise


def needs_capacity(config: EngineConfig) -> bool:
    """Whether the ranks must be asked how much memory they have."""
    return config.device_kv_bytes is None or config.host_kv_bytes is None


def make_rank_config(config: EngineConfig, model: ModelConfig, device: str) -> RankConfig:
    """What the ranks have to know, for a device that has been chosen. Raises ConfigError when the checkpoint cannot be
    read."""
    folder, dtype = Path(config.model).absolute(), model.dtype if config.dtype == "auto" else parse_dtype(config.dtype)
    cache_dir, fingerprint = None, ""
    if config.cache_dir is not None:
        if _shares_prefixes(config, model):
            weights = dummy_digest(config.seed, device) if config.load_format == "dummy" else weights_digest(folder)
            fingerprint = make_fingerprint(weights, model, dtype, config.page_size)
        cache_dir = Path(config.cache_dir).absolute() / (fingerprint[:FOLDER_DIGITS] or SCRATCH)
    return RankConfig(
        folder=folder,
        model=model,
        load_format=config.load_format,
        seed=config.seed,
        dtype=dtype,
        device=device,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_threads=config.num_threads,
        staging_pages=config.staging_pages or config.min_staging_pages,
        cache_dir=cache_dir,
        keep_cache=bool(fingerprint),
        fingerprint=fingerprint,
    )


def make_engine_info(
    config: EngineConfig,
    ranks: RankConfig,
    max_model_len: int,
    capacity: Capacity | None,
    allocate: Callable[[PoolSizes], list[tuple[int, int, int]]],
    measure: Callable[[], list[Bandwidth]],
) -> EngineInfo:
    """Settles the sizes of the pools, has them allocated, and logs them.

    Args:
        capacity: of the rank with the least room; None when `needs_capacity` says that nobody asks.
        allocate: makes pools on all ranks and returns the bytes of each tier for each.
        measure: has all ranks measure how fast these give pages back.

    Raises CapacityError when a tier is too small to work with.
    """
    size = config.tensor_parallel_size
    specs = [rank_page_spec(ranks, Shard.of(ranks.model, rank, size)) for rank in range(size)]
    sizes = _pool_sizes(config, ranks, specs, max_model_len, capacity)
    pool_bytes = allocate(sizes)
    if capacity is not None and capacity.budget:
        log.info("%s", _budget_table(capacity.budget, sizes.device, config.gpu_memory_utilization))
    max_cold_bytes, disk_cost = _cold_budget(config, sizes, measure)
    info = EngineInfo(
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.page_size,
        num_pages=sizes.device,
        num_host_pages=sizes.host,
        num_disk_pages=sizes.disk,
        page_bytes=sum(spec.page_bytes for spec in specs),
        pool_bytes=sum(device for device, _, _ in pool_bytes),
        kv_bytes_per_token=sum(spec.bytes_per_token for spec in specs),
        vocab_size=ranks.model.vocab_size,
        eos_token_ids=ranks.model.eos_token_ids,
        seed=config.seed,
        cache_dir=str(ranks.cache_dir) if sizes.disk else None,
        fingerprint=ranks.fingerprint if sizes.disk else "",
        enable_prefix_caching=_shares_prefixes(config, ranks.model),
        write_through=config.disk_write_policy == "write_through",
        max_cold_bytes_per_step=max_cold_bytes,
        disk_cost=disk_cost,
    )
    if config.enable_prefix_caching and not info.enable_prefix_caching:
        log.warning(
            "prefix caching is off: with rope_type 'dynamic' the keys of a token depend on the length of its prompt, "
            "so prompts that begin alike do not share pages"
        )
    for name, pages, per_rank in zip(
        ("device", "host", "disk"), (sizes.device, sizes.host, sizes.disk), zip(*pool_bytes, strict=True), strict=True
    ):
        log.info(
            "KV cache on %s: %d pages of %d tokens, %.3f GiB over %d rank(s); each rank holds %s GiB",
            name, pages, config.page_size, sum(per_rank) / 2**30, size,
            ", ".join(f"{one / 2**30:.3f}" for one in per_rank),
        )  # fmt: skip
    held = (sizes.device + sizes.host + sizes.disk) * config.page_size
    if held < max_model_len:
        log.warning(
            "the tiers hold %d tokens, less than max_model_len %d; a request that may need more is refused",
            held, max_model_len,
        )  # fmt: skip
    return info


def _budget_table(budget: Budget, num_pages: int, utilization: float) -> str:
    """What the memory of the GPU with the least room is for."""
    rows = [f"GPU memory at gpu_memory_utilization {utilization:g}, GiB:"]
    rows += [f"  {size / 2**30:8.3f}  {name}" for name, size in budget]
    return "\n".join([*rows, f"  {num_pages:8d}  KV pages taken of it"])


def _shares_prefixes(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether pages of equal tokens are equal and are to be kept."""
    return config.enable_prefix_caching and model.rope.rope_type != "dynamic"


def _cold_budget(config: EngineConfig, sizes: PoolSizes, measure: Callable[[], list[Bandwidth]]) -> tuple[int, float]:
    """`EngineInfo.max_cold_bytes_per_step` and `disk_cost`: the bytes as given, or what the host brings in
    STREAM_SECONDS, of which the disk takes more for each byte as it is slower."""
    if not sizes.host:
        return 0, 1.0
    if config.max_cold_bytes_per_step is not None:
        return int(config.max_cold_bytes_per_step), 1.0
    ranks = measure()
    host, disk = (min(getattr(rank, tier) for rank in ranks) for tier in ("host", "disk"))
    log.info("cold pages come from the host at %.1f GB/s, from disk at %.1f, for each rank", host / 1e9, disk / 1e9)
    return int(host * STREAM_SECONDS) * len(ranks), max(1.0, host / disk) if disk else 1.0


def _pool_sizes(
    config: EngineConfig, ranks: RankConfig, specs: list[PageSpec], max_model_len: int, capacity: Capacity | None
) -> PoolSizes:
    """Pages of each tier. Sizes in the options are of all ranks together."""
    on_device, on_host = (sum(spec.page_bytes_in(tier) for spec in specs) for tier in (Tier.DEVICE, Tier.HOST))
    on_disk = replace(specs[0], num_kv_heads=ranks.model.num_key_value_heads).page_bytes_in(Tier.DISK)

    def given(name: str, page_bytes: int) -> int | None:
        size = getattr(config, name)
        if size is None or size == 0:
            return size
        if size < page_bytes:
            raise CapacityError(
                f"{name} {size} is less than one page of {config.page_size} tokens, {page_bytes} bytes over all ranks; "
                "raise it or lower page_size"
            )
        return size // page_bytes

    most = config.max_num_seqs * specs[0].pages_for(max_model_len)
    device = given("device_kv_bytes", on_device)
    if device is None:
        assert capacity is not None
        device = min(capacity.device, most)
    host = given("host_kv_bytes", on_host)
    if host is None:
        assert capacity is not None
        # what is to reach the disk passes through the host
        host = min(capacity.host, most) if device < most or ranks.keep_cache else 0
    staging = ranks.staging_pages if host else 0
    disk = read_ahead = 0
    if ranks.cache_dir is not None and host:
        room = _free_disk_bytes(ranks.cache_dir) // 2 // on_disk
        disk = given("disk_kv_bytes", on_disk) or min(room, max(most, KEPT_PAGES) if ranks.keep_cache else most)
        if disk < 2:
            raise CapacityError(
                f"there is room for {disk} KV pages of {on_disk} bytes in cache_dir; raise disk_kv_bytes to "
                f"{2 * on_disk} at least, or make room on the disk"
            )
        disk -= min(MAX_DISK_WRITES, disk - 1)  # pages on their way to disk lie there twice for a moment
        if KINDS[ranks.device].reads_ahead:  # into host memory, which counts as the host's
            least = -(-(staging // NUM_BUFFERS) // specs[0].num_layers)  # a buffer of the ring
            ahead = max(least, host // 16)
            if host <= ahead:
                raise CapacityError(
                    f"host_kv_bytes holds {host} pages and reading from disk takes {ahead} of them; raise it to "
                    f"{(ahead + 1) * on_host}"
                )
            host, read_ahead = host - ahead, ahead * specs[0].num_layers
    if config.host_kv_bytes is not None or disk:  # else each request is checked by itself
        _check_window(config, device, host, max_model_len, on_device)
    if not _shares_prefixes(config, ranks.model):  # no use for more than the running requests can fill
        device, host, disk = min(device, most), min(host, most), min(disk, most)
    return PoolSizes(device, host, disk, staging, read_ahead)


def _check_window(config: EngineConfig, device: int, host: int, max_model_len: int, page_bytes: int) -> None:
    """Raises CapacityError when a step of the largest size does not fit on the device, and a request may need more."""
    tokens = min(config.max_num_batched_tokens, max_model_len)
    step = pages_for(tokens, config.page_size)
    if not host or device > step or device >= pages_for(max_model_len, config.page_size):
        return
    fits = (device - 1) * config.page_size
    lower = f", or lower max_num_batched_tokens to {fits}" if fits >= config.max_num_seqs else ""
    raise CapacityError(
        f"the device holds {device} KV pages of {config.page_size} tokens, and a step of {tokens} tokens fills {step} "
        f"beside one being written: raise device_kv_bytes by {(step + 1 - device) * page_bytes} to "
        f"{(step + 1) * page_bytes}{lower}"
    )


def _free_disk_bytes(folder: Path) -> int:
    """What is free where the folder is or will be, or taken by the pages that lie in it."""
    array = folder / ARRAY
    taken = sum(file.stat().st_size for file in os.scandir(array)) if array.is_dir() else 0
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free + taken


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
