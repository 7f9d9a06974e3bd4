"""The page for people, and what feeds its live picture."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from distkv.engine.stats import EngineStats
from distkv.server.connection import EventStream, error_event, event
from distkv.server.errors import api_error, openai_error
from distkv.server.page_files import page_file
from distkv.server.service import Service

SECONDS = 0.5  # between two samples


def live_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        """The page."""
        return page_file("index.html")

    @router.get("/live")
    async def live() -> Response:
        """Samples of the engine's state as server-sent events, until the server ends."""
        return EventStream(_samples(service), lambda error: error_event(openai_error(api_error(error))))

    return router


async def _samples(service: Service) -> AsyncGenerator[bytes, None]:
    before, since = await service.llm.stats(), time.monotonic()
    yield event(_sample(service, before, before, 1.0))
    while not service.is_draining:
        await asyncio.sleep(SECONDS)
        stats, now = await service.llm.stats(), time.monotonic()
        yield event(_sample(service, before, stats, now - since))
        before, since = stats, now


def _sample(service: Service, before: EngineStats, stats: EngineStats, seconds: float) -> dict[str, Any]:
    return {
        "model": service.names[0],
        "tokens_per_second": _growth(before.requests.generation_tokens, stats.requests.generation_tokens) / seconds,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "pages_in_use": stats.pages_in_use,
        "idle_pages": stats.idle_pages,
        "tiers": {
            name: {
                "pages": tier.used_pages,
                "capacity": tier.num_pages,
                "bytes": tier.used_bytes,
                "capacity_bytes": tier.capacity_bytes,
            }
            for name, tier in stats.tiers.items()
        },
        "bytes_per_second": {
            route: _growth(before.bytes_moved.get(route, 0), count) / seconds
            for route, count in stats.bytes_moved.items()
        },
    }


def _growth(before: int, now: int) -> int:
    """Of a sum over engines, which is less when one of them has been lost."""
    return max(0, now - before)
