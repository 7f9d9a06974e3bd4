"""What is said of an engine that has started: what its model takes, what fits where, what a token costs then."""

from collections.abc import Iterable
from pathlib import Path

from distkv.config import EngineConfig
from distkv.engine.protocol import EngineInfo
from distkv.launch.launch import check_config
from distkv.planner.hardware import Hardware
from distkv.planner.model_shape import ModelShape
from distkv.planner.plan import make_plan
from distkv.planner.ranks import layout_of, make_rank_config
from distkv.planner.request import PlanRequest
from distkv.planner.sizing import page_bytes, page_specs
from distkv.planner.units import shown_bytes, shown_seconds, shown_share
from distkv.storage.dtypes import ITEM_BYTES
from distkv.storage.paging import pages_for
from distkv.storage.tier import Tier
from distkv.workers.attention.policies.registry import FULL
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec


def start_lines(config: EngineConfig, info: EngineInfo | None = None, hardware: Hardware | None = None) -> list[str]:
    """Three short lines, or fewer where less is known.

    Args:
        info: of the engine; None for those that start elsewhere.
        hardware: of its ranks, as `engine_hardware` finds it.
    """
    model = ModelShape(Path(config.model).name, ModelConfig.load(Path(config.model)))
    lines = [_sizes(config, model)]
    if info is None:
        lines += _room_elsewhere(config)
    else:
        pages = info.num_pages, info.num_host_pages, info.num_disk_pages
        beside = f"; summaries of pages up to {shown_bytes(info.summary_bytes)} in memory" if info.summary_bytes else ""
        lines.append(_room(pages, info.tier_bytes, info.page_size, info.max_model_len) + beside)
        lines += [] if hardware is None else _cost(config, info, model, hardware)
    return [f"plan: {line}" for line in lines]


def _sizes(config: EngineConfig, model: ModelShape) -> str:
    dtype, layout = model.config.run_dtype(config.dtype), layout_of(config)
    size = layout.size
    ranks = [model.rank_parameters(layout, rank).total * ITEM_BYTES[dtype] for rank in range(size)]
    spec = model_page_spec(model.config, config.page_size, dtype, config.kv_cache_dtype)
    most = f", at most {shown_bytes(max(ranks))} on one of {size} ranks" if size > 1 else ""
    kv = f"KV {shown_bytes(spec.bytes_per_token)} a token"
    if spec.format is not None:
        kv += f", {shown_bytes(spec.bytes_per_token_in(Tier.HOST))} below the device as {config.kv_cache_dtype}"
    if config.attention_policy != FULL:
        kv += f", attended to by {config.attention_policy}"
    return f"{model.name} in {dtype}: weights {shown_bytes(sum(ranks))}{most}; {kv}"


def _room(pages: Iterable[int], tier_bytes: Iterable[int], page_size: int, max_model_len: int) -> str:
    """Of the tiers that have pages."""
    held, tiers = 0, []
    for tier, count, size in zip(Tier, pages, tier_bytes, strict=True):
        held += count
        if count:
            tiers.append(f"{tier.name.lower()} {shown_bytes(size)} for {count * page_size:,} tokens")
    number = held // pages_for(max_model_len, page_size)
    return f"KV on {', '.join(tiers)}: {number} requests of {max_model_len:,} tokens, max_model_len"


def _room_elsewhere(config: EngineConfig) -> list[str]:
    """Of each engine that starts where its memory is not known here: the tiers whose sizes the options give."""
    model, max_model_len = check_config(config)
    ranks = make_rank_config(config, model, "cpu")  # pages are the same on any kind
    sizes = page_bytes(ranks, page_specs(ranks))
    given = config.device_kv_bytes, config.host_kv_bytes, config.disk_kv_bytes
    pages = [int(size or 0) // one for size, one in zip(given, sizes, strict=True)]
    if not any(pages):
        return []
    tier_bytes = [count * one for count, one in zip(pages, sizes, strict=True)]
    other = "" if None not in given[:2] else "; a tier that no option sizes is found where the engine runs"
    return [_room(pages, tier_bytes, config.plan_page_size, max_model_len) + other]


def _cost(config: EngineConfig, info: EngineInfo, model: ModelShape, hardware: Hardware) -> list[str]:
    """Of one request as long as fits; nothing where the planner refuses what the engine has taken."""
    held = (info.num_pages + info.num_host_pages + info.num_disk_pages) * info.page_size
    context = min(info.max_model_len, held)
    device, host, disk = info.tier_bytes
    request = PlanRequest(
        model, hardware, tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        decode_context_parallel_size=config.decode_context_parallel_size, dtype=config.dtype, context=context,
        kv_cache_dtype=config.kv_cache_dtype if host else "auto", attention_policy=config.attention_policy,
        cpu_attention=config.cpu_attention if host else "off",
        device_kv_bytes=device, host_kv_bytes=host, disk_kv_bytes=disk, page_size=config.page_size,
        max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens,
    )  # fmt: skip
    decode = make_plan(request).decode
    if decode is None:
        return []
    part = f" and reads {shown_share(share)} of them" if (share := request.share_read) < 1 else ""
    return [
        f"a token takes about {shown_seconds(decode.seconds)} at {context:,} tokens{part}, bound by {decode.limit} "
        f"({hardware.name}, {hardware.source})"
    ]
