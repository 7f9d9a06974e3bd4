"""What `distkv.Client` asks for: requests with all of their parameters, outputs with all that they tell, the state of
the engine."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from distkv.client import wire
from distkv.errors import DistKVError, RequestError
from distkv.frontend.request_checks import check_params
from distkv.sampling_params import RequestOutputKind
from distkv.server.answers import Outputs, answer_all
from distkv.server.connection import EventStream
from distkv.server.errors import api_error
from distkv.server.schemas.body import Body
from distkv.server.service import Service

ANY_JSON: dict[str, Any] = {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}}


class NoOptions(Body):
    """An empty object: a body at all keeps other sites' pages from asking, which cannot send JSON."""


def own_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["distkv"])

    @router.post(wire.GENERATE, openapi_extra=ANY_JSON)
    async def generate(request: Request) -> Response:
        """Answers the requests of a `wire.Call` with `wire.Event`s."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError("the body must be JSON, sent with 'content-type: application/json'")
        try:
            call = wire.decode_call(await request.body())
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(str(error)) from error
        return EventStream(_events(service, call.items), lambda error: _event(wire.Event(error=_failure(error))))

    @router.get(wire.STATS)
    async def stats() -> Response:
        """The state of the engine, as `LLM.stats` tells it."""
        return Response(wire.encode(await service.llm.stats()), media_type="application/json")

    @router.post(wire.RESET)
    async def reset_prefix_cache(body: NoOptions) -> dict[str, Any]:
        """Forgets the pages of ended requests that are kept for later ones."""
        await service.llm.reset_prefix_cache()
        return {}

    return router


async def _events(service: Service, items: list[wire.Item]) -> AsyncGenerator[bytes, None]:
    for item in items:
        check_params(item.sampling_params, service.llm.info)
    outputs = [_until_failure(_outputs(service, item)) for item in items]
    num_answers = sum(item.sampling_params.n for item in items)
    async with aclosing(answer_all(service, num_answers, outputs)) as answers:
        async for index, output in answers:
            yield _event(wire.Event(index, output))


def _outputs(service: Service, item: wire.Item) -> Outputs:
    params = item.sampling_params
    if params.output_kind is RequestOutputKind.CUMULATIVE:
        raise RequestError("output_kind is CUMULATIVE; over HTTP it must be DELTA or FINAL_ONLY")
    if (item.prompt is None) == (item.messages is None):
        raise RequestError("a request has both prompt and messages, or neither; give one of them")
    if item.messages is None:
        for name in ("session", "tools", "chat_template_kwargs"):
            if getattr(item, name) is not None:
                raise RequestError(f"{name} is for messages; leave it out beside a prompt")
        assert item.prompt is not None
        return service.llm.generate(item.prompt, params, priority=item.priority, cache_salt=item.cache_salt)
    return service.llm.chat(
        item.messages, params, priority=item.priority, cache_salt=item.cache_salt, session=item.session,
        tools=item.tools, chat_template_kwargs=item.chat_template_kwargs,
    )  # fmt: skip


async def _until_failure(outputs: Outputs) -> Outputs:
    """The outputs of a request; one that could not go on, beside others that can, ends in an output with its error."""
    async with aclosing(outputs):
        try:
            async for output in outputs:
                yield output
        except DistKVError as error:
            if error.output is None:  # the engine has ended, or the call is none
                raise
            yield error.output


def _failure(error: Exception) -> wire.Failure:
    found = api_error(error)
    return wire.Failure(found.message, found.code)


def _event(event: wire.Event) -> bytes:
    return b"data: %s\n\n" % wire.encode(event)
