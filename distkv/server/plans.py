"""Capacity plans over HTTP, made as `distkv plan` makes them, and the page that asks for them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from distkv.option_checks import parse_bytes
from distkv.planner.hardware import GPUS, find_hardware, with_disk
from distkv.planner.model_shape import ModelShape, find_known_model, known_models
from distkv.planner.plan import make_plan
from distkv.planner.request import KV_DTYPES, PlanRequest
from distkv.planner.units import parse_tokens, shown_tokens
from distkv.server.json import encode_ascii
from distkv.server.page_files import page_file
from distkv.server.schemas.plan import PlanBody
from distkv.storage.dtypes import DTYPES

DEFAULT_MODEL, DEFAULT_GPU = "llama-3.1-8b", "h100"
MAIN_FIELDS = ("tensor_parallel_size", "context", "concurrency", "kv_dtype", "host_kv_bytes", "disk_kv_bytes")
"""That the page always shows, beside model and GPU."""


@dataclass(frozen=True)
class OwnModel:
    """A model that a server knows beside those that are known by name, and with which its page begins."""

    name: str
    shape: ModelShape
    is_served: bool
    start: dict[str, Any] = field(default_factory=dict)  # fields of `PlanBody` that the page begins with


def plan_routes(own_model: Callable[[], OwnModel | None]) -> APIRouter:
    """The routes. `own_model` is called in a thread; no path that a client names is looked at."""
    router = APIRouter(tags=["planner"])

    @router.get("/plan", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return page_file("plan.html")

    @router.get("/plan/choices")
    async def choices() -> Response:
        """The models and GPUs that are known by name, the defaults of a plan, and what the page begins with."""
        return _json(_choices(await asyncio.to_thread(own_model)))

    @router.post("/plan")
    async def plan(body: PlanBody) -> Response:
        """What of a model's KV cache fits where, and what a token costs then."""
        return _json(await asyncio.to_thread(_plan, body, own_model))

    return router


def _json(value: dict[str, Any]) -> Response:
    return Response(encode_ascii(value), media_type="application/json")  # integers may have more than 64 bits


def _plan(body: PlanBody, own_model: Callable[[], OwnModel | None]) -> dict[str, Any]:
    given = body.model_dump(exclude_none=True, exclude={"model", "gpu", "disk_bandwidth"})
    if "context" in given:
        given["context"] = parse_tokens("context", given["context"])
    disk = None if body.disk_bandwidth is None else parse_bytes("disk_bandwidth", body.disk_bandwidth)
    own = own_model()
    model = own.shape if own is not None and body.model == own.name else find_known_model(body.model)
    return make_plan(PlanRequest(model, with_disk(find_hardware(body.gpu), disk), **given)).to_json()


def _choices(own: OwnModel | None) -> dict[str, Any]:
    names = [] if own is None else [own.name]
    found = {name: getattr(PlanRequest, name, None) for name in PlanBody.model_fields}
    defaults = {name: value for name, value in found.items() if value is not None}
    start = {name: defaults[name] for name in MAIN_FIELDS} | {"model": DEFAULT_MODEL, "gpu": DEFAULT_GPU}
    if own is not None:
        start |= {"model": own.name, **{name: one for name, one in own.start.items() if one != defaults.get(name)}}
    start["context"] = shown_tokens(start["context"])
    return {
        "models": [
            {"name": name, "is_served": own is not None and own.is_served and name == own.name}
            for name in dict.fromkeys([*names, *sorted(known_models())])
        ],
        "gpus": [{"name": name, "title": gpu.name} for name, gpu in GPUS.items()],
        "dtypes": ["auto", *DTYPES],
        "kv_dtypes": ["auto", *KV_DTYPES],
        "defaults": defaults,
        "start": start,
        "has_chat": own is not None and own.is_served,
    }
