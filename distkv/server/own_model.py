"""The loaded model as plans begin with it."""

from functools import partial

from fastapi import APIRouter

from distkv.planner.model_shape import find_model
from distkv.planner.units import option_bytes
from distkv.server.plans import OwnModel, plan_routes
from distkv.server.service import Service


def own_plan_routes(service: Service) -> APIRouter:
    """The routes of the planner for a server that has a model, or is loading it."""
    return plan_routes(partial(_own_model, service))


def _own_model(service: Service) -> OwnModel | None:
    """None while it is being loaded."""
    if not service.is_loaded:
        return None
    config, info = service.llm.config, service.llm.info
    _, host, disk = info.tier_bytes
    start = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "dtype": config.dtype,
        "context": info.max_model_len,
        "host_kv_bytes": option_bytes(host),
        "disk_kv_bytes": option_bytes(disk),
        "page_size": info.page_size,
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
    }
    return OwnModel(service.names[0], find_model(info.model), is_served=True, start=start)
