"""The loaded model and its options, as plans begin with them."""

from functools import partial

from fastapi import APIRouter

from distkv.planner.model_shape import find_model
from distkv.planner.units import option_bytes
from distkv.server.plans import HERE, PlanStart, plan_routes
from distkv.server.service import Service


def own_plan_routes(service: Service) -> APIRouter:
    """The routes of the planner for a server that has a model, or is loading it."""
    return plan_routes(partial(_own_start, service))


def _own_start(service: Service) -> PlanStart:
    if not service.is_loaded:
        return PlanStart(has_chat=True)
    config, info = service.llm.config, service.llm.info
    device, host, disk = info.tier_bytes  # where the options do not say
    fields = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "decode_context_parallel_size": config.decode_context_parallel_size,
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype if host else "auto",
        "attention_policy": config.attention_policy,
        "context": info.max_model_len,
        "host_kv_bytes": option_bytes(int(config.host_kv_bytes or host)),
        "disk_kv_bytes": option_bytes(int(config.disk_kv_bytes or disk)),
        "page_size": config.page_size,
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
    }
    if service.hardware is not None:  # on others what is left there is taken
        fields |= {"gpu": HERE, "device_kv_bytes": option_bytes(int(config.device_kv_bytes or device))}
    return PlanStart(fields, find_model(info.model), service.names, has_chat=True, hardware=service.hardware)
