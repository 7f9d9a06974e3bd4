"""Capacity plans over HTTP, made as `distkv plan` makes them, and the page that asks for them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from distkv.errors import ConfigError
from distkv.kernels.codec_format import FORMATS
from distkv.option_checks import parse_bytes
from distkv.planner.hardware import GPUS, Hardware, find_hardware, with_disk
from distkv.planner.model_shape import ModelShape, find_known_model, known_models
from distkv.planner.nodes import parse_node
from distkv.planner.options import DEFAULT_GPU, DEFAULT_MODEL
from distkv.planner.plan import make_plan
from distkv.planner.request import PARALLEL, PlanRequest
from distkv.planner.units import parse_tokens, shown_tokens
from distkv.server.json import encode_ascii
from distkv.server.page_files import page_file
from distkv.server.schemas.plan import PlanBody
from distkv.storage.dtypes import DTYPES

MAIN_FIELDS = ("tensor_parallel_size", "context", "concurrency", "kv_cache_dtype", "host_kv_bytes", "disk_kv_bytes")
"""That the page always shows, beside model and GPU."""
HERE = "here"
"""What a server runs on, by the name that clients have for it."""


@dataclass(frozen=True)
class PlanStart:
    """What the page begins with."""

    fields: dict[str, Any] = field(default_factory=dict)  # of `PlanBody`; it has defaults for the rest
    model: ModelShape | None = None  # beside those that are known to all by name
    names: Sequence[str] = ()  # of that model; the page has the first
    has_chat: bool = False  # whether a model is served here, that one if there is one
    hardware: Hardware | None = None  # that it runs on, which `fields` name "here"


def plan_routes(find_start: Callable[[], PlanStart]) -> APIRouter:
    """The routes. `find_start` is called in a thread. No path that a client names is looked at."""
    router = APIRouter(tags=["planner"])

    @router.get("/plan", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return page_file("plan.html")

    @router.get("/plan/choices")
    async def choices() -> Response:
        """The models and GPUs that are known by name, the defaults of a plan, and what the page begins with."""
        return _json(_choices(await asyncio.to_thread(find_start)))

    @router.post("/plan")
    async def plan(body: PlanBody) -> Response:
        """What of a model's KV cache fits where, and what a token costs then."""
        return _json(await asyncio.to_thread(_plan, body, find_start))

    return router


def _json(value: dict[str, Any]) -> Response:
    return Response(encode_ascii(value), media_type="application/json")  # integers may have more than 64 bits


def _plan(body: PlanBody, find_start: Callable[[], PlanStart]) -> dict[str, Any]:
    given = body.model_dump(exclude_none=True, exclude={"model", "gpu", "disk_bandwidth"})
    if "context" in given:
        given["context"] = parse_tokens("context", given["context"])
    if "node" in given:
        given["node"] = parse_node(given["node"])
    disk = None if body.disk_bandwidth is None else parse_bytes("disk_bandwidth", body.disk_bandwidth)
    start = find_start()
    own = start.model if body.model in start.names else None
    model = find_known_model(body.model) if own is None else own
    here = start.hardware if body.gpu == HERE else None
    hardware = find_hardware(body.gpu) if here is None else here
    several = next((name for name in (*PARALLEL, "nodes") if given.get(name, 1) > 1), None)
    if hardware.is_cpu and several:
        raise ConfigError(
            f"{several} {given[several]} would have several ranks share the cores and the memory of one CPU, which was "
            "measured as a whole; use 1"
        )
    return make_plan(PlanRequest(model, with_disk(hardware, disk), **given)).to_json()


def _choices(start: PlanStart) -> dict[str, Any]:
    found = {name: getattr(PlanRequest, name, None) for name in PlanBody.model_fields if name != "node"}
    defaults = {name: value for name, value in found.items() if value is not None}
    own = list(start.names[:1])
    begin = {name: defaults[name] for name in MAIN_FIELDS} | {"gpu": DEFAULT_GPU, "model": (own or [DEFAULT_MODEL])[0]}
    begin |= {name: one for name, one in start.fields.items() if one != defaults.get(name)}
    begin["context"] = shown_tokens(begin["context"])
    devices = {name: one.name for name, one in GPUS.items()}
    if start.hardware is not None:
        devices = {HERE: f"{start.hardware.name} (this machine)", **devices}
    return {
        "models": [
            {"name": name, "is_served": start.has_chat and name in own}
            for name in dict.fromkeys([*own, *sorted(known_models())])
        ],
        "gpus": [{"name": name, "title": title} for name, title in devices.items()],
        "dtypes": ["auto", *DTYPES],
        "kv_cache_dtypes": ["auto", *FORMATS],
        "defaults": defaults,
        "start": begin,
        "has_chat": start.has_chat,
    }
